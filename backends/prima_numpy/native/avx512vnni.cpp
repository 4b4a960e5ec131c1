// AVX-512 with VNNI. Few activation rows: four weight rows at once, sums along the row, added across lanes per block
// (rows_*.inl). Many: panels of weight rows with the activation rows in the lanes, so that nothing is added across lanes.

#include <immintrin.h>
#include <math.h>
#include <cstring>
#include <type_traits>

#include "codebooks.h"
#include "kernels.h"

namespace prima {
namespace avx512vnni {
namespace {

#include "half.h"
#include "lanes_avx512.h"
#include "generic.inl"
#include "bytes_x86.h"
#include "blocks.inl"
#include "wide_avx512.h"

inline __m256i add_pairs(__m256i sum, __m256i words, __m256i scales) { return _mm256_dpwssd_epi32(sum, words, scales); }
constexpr bool kDotsAnyBytes = true;
template <class B>
inline Wide dot_codes(Wide sum, Wide low, Wide high, Wide x_low, Wide x_high) {
    return {_mm512_dpbusd_epi32(_mm512_dpbusd_epi32(sum.v, low.v, x_low.v), high.v, x_high.v)};
}

#include "rows_small.inl"
#include "rows_x86.inl"
#include "rows_avx512.inl"
#include "transpose_avx512.h"
#include "vectors_avx512.h"
#include "quantize_avx512.inl"

inline Ints dot_bytes(Ints sum, Ints codes, Ints x) { return {_mm512_dpbusd_epi32(sum.v, codes.v, x.v)}; }
// 16 or 24 sums, 4 vectors of activations and a code in 32 registers.
constexpr int kTileVectors = 4, kBigTileRows = 4, kSmallTileRows = 6, kNarrowTileRows = 8;
#include "panel_x86.inl"

template <class B, int T>
constexpr DotRows rows_of() {
    if constexpr (B::kWeights == kQ8Block) {
        return dot_small_rows<B, T>;
    } else if constexpr (B::kIsSlow) {
        return dot_big_rows<B, T>;
    } else {
        return dot_wide_rows<B, T>;
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

constexpr Table make_avx512vnni() {
    Table table = make_table("avx512vnni", all_matrices<Quantised>());
    table.quantize_k = quantize_k_512;
    table.quantize_8 = quantize_8_512;
    table.join_k = join_k;
    table.join_8 = join_8;
    table.multiply = multiply_registers;
    return table;
}
constexpr Table kTable = make_avx512vnni();

}  // namespace
}  // namespace avx512vnni

const Table& avx512vnni_table() { return avx512vnni::kTable; }

}  // namespace prima
