// AVX-512 with VNNI. One activation row: four weight rows at once, sums along the row, added across lanes per block.
// rows_x86.inl does so for every quantised type; Q4_K and Q6_K, the most used, have tuned loops here instead.
// Several: panels of weight rows, with the activation rows in the lanes, so that nothing is added across lanes.

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

inline __m512i load512(const void* p) { return _mm512_loadu_si512(p); }

inline __m128i add_across(__m512i a, __m512i b, __m512i c, __m512i d) {
    const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    const __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
    return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

inline __m256i add_pairs(__m256i sum, __m256i words, __m256i scales) { return _mm256_dpwssd_epi32(sum, words, scales); }
constexpr bool kDotsAnyBytes = true;
inline __m256i dot_bytes(__m256i codes, __m256i x) { return _mm256_dpbusd_epi32(_mm256_setzero_si256(), codes, x); }

#include "rows_x86.inl"

// ---------------------------------------------------------------- Q4_K

// 64 nibbles of weights k .. k + 31 and k + 64 .. k + 95: the order in which they come out of 64 bytes.
inline __m512i load_apart(const int8_t* q) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(load256(q)), load256(q + 64), 1);
}

void dot_q4_rows(const uint8_t* const rows[4], const Activations& a, int64_t t, float out[4]) {
    const __m512i low_mask = _mm512_set1_epi8(15);
    // Which of a block's eight scales (words) goes with which word of a product.
    const auto pair = [](int first, int second) {
        return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_set1_epi16(short(first))),
                                  _mm256_set1_epi16(short(second)), 1);
    };
    const __m512i pick[4] = {pair(0, 2), pair(1, 3), pair(4, 6), pair(5, 7)};
    __m128 total = _mm_setzero_ps();
    const BlockK* x = a.k + t;
    const int64_t n_blocks = a.cols / kKBlock;
    for (int64_t b = 0; b < n_blocks; ++b, x += a.n) {
        const __m512i xs[4] = {load_apart(x->q), load_apart(x->q + 32), load_apart(x->q + 128), load_apart(x->q + 160)};
        const __m128i x_sums = load128(x->sum32);
        const uint8_t* blocks[4];
        __m512i sums[4];
        __m128i lows[4];
        for (int r = 0; r < 4; ++r) {
            const uint8_t* block = blocks[r] = rows[r] + b * Q4_K::kBytes;
            for (int i = 0; i < Q4_K::kBytes; i += 64) prefetch(block + kPrefetchBytes + i);
            uint64_t scales, minima;
            unpack_scales(block + 4, scales, minima);
            lows[r] = _mm_madd_epi16(_mm_cvtepu8_epi16(_mm_cvtsi64_si128((long long)minima)), x_sums);
            const __m512i words = _mm512_castsi128_si512(_mm_cvtepu8_epi16(_mm_cvtsi64_si128((long long)scales)));
            __m512i sum = _mm512_setzero_si512();
            for (int h = 0; h < 2; ++h) {
                const __m512i bytes = load512(block + 16 + 64 * h);
                const __m512i low = _mm512_maddubs_epi16(_mm512_and_si512(bytes, low_mask), xs[2 * h]);
                const __m512i high =
                    _mm512_maddubs_epi16(_mm512_and_si512(_mm512_srli_epi16(bytes, 4), low_mask), xs[2 * h + 1]);
                sum = _mm512_dpwssd_epi32(sum, low, _mm512_permutexvar_epi16(pick[2 * h], words));
                sum = _mm512_dpwssd_epi32(sum, high, _mm512_permutexvar_epi16(pick[2 * h + 1], words));
            }
            sums[r] = sum;
        }
        const __m128 sum = _mm_cvtepi32_ps(add_across(sums[0], sums[1], sums[2], sums[3]));
        const __m128 low = _mm_cvtepi32_ps(add_across(lows[0], lows[1], lows[2], lows[3]));
        const __m128 term =
            _mm_sub_ps(_mm_mul_ps(load_halves(blocks, 0), sum), _mm_mul_ps(load_halves(blocks, 2), low));
        total = _mm_add_ps(total, _mm_mul_ps(_mm_set1_ps(x->scale), term));
    }
    _mm_storeu_ps(out, total);
}

// ---------------------------------------------------------------- Q6_K

// Codes 0..63 of weights 128 h .. + 63 and + 64 .. + 127.
inline void unpack_q6(const uint8_t* block, int h, __m512i& first, __m512i& second) {
    const __m512i mask = _mm512_set1_epi8(15), high_mask = _mm512_set1_epi8(0x30);
    const __m512i zero = _mm512_setzero_si512(), two = _mm512_set1_epi16(2), four = _mm512_set1_epi16(4);
    // The same 32 bytes of high bits serve both halves, with two more bits of shift in the upper one.
    const __m512i left = _mm512_inserti64x4(four, _mm512_castsi512_si256(two), 1);
    const __m512i right = _mm512_inserti64x4(zero, _mm512_castsi512_si256(two), 1);
    const __m512i low = load512(block + 64 * h);
    const __m512i high = _mm512_broadcast_i64x4(load256(block + 128 + 32 * h));
    first = _mm512_or_si512(_mm512_and_si512(low, mask), _mm512_and_si512(_mm512_sllv_epi16(high, left), high_mask));
    second = _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi16(low, 4), mask),
                             _mm512_and_si512(_mm512_srlv_epi16(high, right), high_mask));
}

void dot_q6_rows(const uint8_t* const rows[4], const Activations& a, int64_t t, float out[4]) {
    const __m512i eights = _mm512_set_epi16(3, 3, 3, 3, 3, 3, 3, 3, 2, 2, 2, 2, 2, 2, 2, 2,  //
                                            1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
    __m128 total = _mm_setzero_ps();
    const BlockK* x = a.k + t;
    const int64_t n_blocks = a.cols / kKBlock;
    for (int64_t b = 0; b < n_blocks; ++b, x += a.n) {
        const __m512i xs[4] = {load512(x->q), load512(x->q + 64), load512(x->q + 128), load512(x->q + 192)};
        const __m256i x_sums = load256(x->sum16);
        const uint8_t* blocks[4];
        __m512i sums[4];
        for (int r = 0; r < 4; ++r) {
            const uint8_t* block = blocks[r] = rows[r] + b * Q6_K::kBytes;
            for (int i = 0; i < Q6_K::kBytes; i += 64) prefetch(block + kPrefetchBytes + i);
            const __m256i scales = _mm256_cvtepi8_epi16(load128(block + 192));
            const __m512i words = _mm512_castsi256_si512(scales);
            __m512i sum = _mm512_setzero_si512();
            for (int h = 0; h < 2; ++h) {
                __m512i first, second;
                unpack_q6(block, h, first, second);
                const __m512i pick = _mm512_add_epi16(eights, _mm512_set1_epi16(short(8 * h)));
                const __m512i pick_next = _mm512_add_epi16(pick, _mm512_set1_epi16(4));
                sum = _mm512_dpwssd_epi32(sum, _mm512_maddubs_epi16(first, xs[2 * h]),
                                          _mm512_permutexvar_epi16(pick, words));
                sum = _mm512_dpwssd_epi32(sum, _mm512_maddubs_epi16(second, xs[2 * h + 1]),
                                          _mm512_permutexvar_epi16(pick_next, words));
            }
            // Codes stand for code - 32.
            const __m256i offset = _mm256_slli_epi32(_mm256_madd_epi16(scales, x_sums), 5);
            sums[r] = _mm512_sub_epi32(sum, _mm512_zextsi256_si512(offset));
        }
        const __m128 sum = _mm_cvtepi32_ps(add_across(sums[0], sums[1], sums[2], sums[3]));
        const __m128 term = _mm_mul_ps(load_halves(blocks, 208), sum);
        total = _mm_add_ps(total, _mm_mul_ps(_mm_set1_ps(x->scale), term));
    }
    _mm_storeu_ps(out, total);
}

#include "quantize_avx512.inl"
#include "panel_avx512.inl"

template <class B>
struct Quantised {
    static constexpr MatrixKernels kernels() {
        return {{rows_of<B>()}, dot_panel<B>, B::kIsSlow ? 2 : kPanelFrom, B::kWeights, B::kBytes, kPanelRows512};
    }
};

constexpr Table make_avx512vnni() {
    Table table = make_table("avx512vnni", all_matrices<Quantised>());
    table.quantize_k = quantize_k_512;
    table.quantize_8 = quantize_8_512;
    table.join_k = join_k;
    table.join_8 = join_8;
    return table;
}
constexpr Table kTable = make_avx512vnni();

}  // namespace
}  // namespace avx512vnni

const Table& avx512vnni_table() { return avx512vnni::kTable; }

}  // namespace prima
