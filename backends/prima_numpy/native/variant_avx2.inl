// AVX2 with F16C, and AVX-VNNI where PRIMA_HAS_VNNI says so. Included as a file of its own for each: PRIMA_VARIANT is the
// namespace. Few activation rows: four weight rows at once, sums along the row, added across lanes per block (rows_*.inl).
// Many: 8 weight rows unpacked to a panel with the rows in the lanes, so that nothing is added across lanes.

#include <immintrin.h>
#include <math.h>
#include <cstring>
#include <type_traits>

#include "codebooks.h"
#include "kernels.h"

namespace prima {
namespace PRIMA_VARIANT {
namespace {

#include "half.h"
#include "lanes_avx2.h"
#include "generic.inl"
#include "bytes_x86.h"
#include "blocks.inl"
#include "wide_avx2.h"

#ifdef PRIMA_HAS_VNNI

inline __m256i add_pairs(__m256i sum, __m256i words, __m256i scales) {
    return _mm256_dpwssd_avx_epi32(sum, words, scales);
}
constexpr bool kDotsAnyBytes = true;
template <class B>
inline Wide dot_codes(Wide sum, Wide low, Wide high, Wide x_low, Wide x_high) {
    return {_mm256_dpbusd_avx_epi32(_mm256_dpbusd_avx_epi32(sum.v, low.v, x_low.v), high.v, x_high.v)};
}

#else

inline __m256i add_pairs(__m256i sum, __m256i words, __m256i scales) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(words, scales));
}
constexpr bool kDotsAnyBytes = false;
template <class B>
inline Wide dot_codes(Wide sum, Wide low, Wide high, Wide x_low, Wide x_high) {
    const __m256i ones = _mm256_set1_epi16(1);
    if constexpr (B::kIsSigned) {  // pairs may fill a word
        const __m256i first = _mm256_maddubs_epi16(_mm256_abs_epi8(low.v), _mm256_sign_epi8(x_low.v, low.v));
        const __m256i second = _mm256_maddubs_epi16(_mm256_abs_epi8(high.v), _mm256_sign_epi8(x_high.v, high.v));
        const __m256i both = _mm256_add_epi32(_mm256_madd_epi16(first, ones), _mm256_madd_epi16(second, ones));
        return {_mm256_add_epi32(sum.v, both)};
    }
    const __m256i words =
        _mm256_add_epi16(_mm256_maddubs_epi16(low.v, x_low.v), _mm256_maddubs_epi16(high.v, x_high.v));
    return {_mm256_add_epi32(sum.v, _mm256_madd_epi16(words, ones))};
}

#endif

#include "rows_small.inl"
#include "rows_x86.inl"
#include "panel_avx2.inl"

template <class B, int T>
constexpr DotRows rows_of() {
    if constexpr (B::kWeights == kQ8Block) {
        return dot_small_rows<B, T>;
    } else {
        return dot_big_rows<B, T>;
    }
}

template <class B>
struct Quantised {
    static constexpr MatrixKernels kernels() {
        return {{rows_of<B, 1>(), rows_of<B, 2>(), rows_of<B, 3>(), rows_of<B, 4>()},
                dot_panel<B>,
                B::kIsSlow ? kTogether + 1 : kPanelFrom,
                B::kWeights,
                B::kBytes};
    }
};

#define PRIMA_TEXT_OF(name) #name
#define PRIMA_TEXT(name) PRIMA_TEXT_OF(name)
constexpr Table kTable = make_table(PRIMA_TEXT(PRIMA_VARIANT), all_matrices<Quantised>());

}  // namespace
}  // namespace PRIMA_VARIANT
}  // namespace prima
