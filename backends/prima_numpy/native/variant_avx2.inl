// AVX2 with F16C, and AVX-VNNI where PRIMA_HAS_VNNI says so. Included as a file of its own for each: PRIMA_VARIANT is the
// namespace. Few activation rows: four weight rows at once, sums along the row, added across lanes per block (rows_*.inl).
// Many: panels of weight rows with the activation rows in the lanes, so that nothing is added across lanes.

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

// Keeps compilers from adding up in another order: they would need registers for all products at once.
inline __m256i in_order(__m256i sum) {
#if defined(__GNUC__) || defined(__clang__)
    __asm__("" : "+x"(sum));
#endif
    return sum;
}

inline __m256i add_pairs(__m256i sum, __m256i words, __m256i scales) {
    return in_order(_mm256_add_epi32(sum, _mm256_madd_epi16(words, scales)));
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
#include "vectors_avx2.h"
#include "quantize_avx2.inl"

#ifdef PRIMA_HAS_VNNI
inline Ints dot_bytes(Ints sum, Ints codes, Ints x) { return {_mm256_dpbusd_avx_epi32(sum.v, codes.v, x.v)}; }
#else
inline Ints dot_bytes(Ints sum, Ints codes, Ints x) {
    return {in_order(_mm256_add_epi16(sum.v, _mm256_maddubs_epi16(codes.v, x.v)))};
}
#endif
// 12 sums, 2 vectors of activations and a code in 16 registers.
constexpr int kTileVectors = 2, kBigTileRows = 6, kSmallTileRows = 6, kNarrowTileRows = 8;
#include "panel_x86.inl"

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
                B::kBytes,
                kPanelRowsX86};
    }
};

#define PRIMA_TEXT_OF(name) #name
#define PRIMA_TEXT(name) PRIMA_TEXT_OF(name)

constexpr Table make_variant() {
    Table table = make_table(PRIMA_TEXT(PRIMA_VARIANT), all_matrices<Quantised>());
    table.join_k = join_k;
    table.join_8 = join_8;
    table.multiply = multiply_registers;
    return table;
}
constexpr Table kTable = make_variant();

}  // namespace
}  // namespace PRIMA_VARIANT
}  // namespace prima
