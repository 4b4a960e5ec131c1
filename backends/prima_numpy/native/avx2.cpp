// AVX2 with F16C. One activation row: four weight rows at once, sums along the row, added across lanes per block.
// rows_x86.inl does so for every quantised type; Q4_K and Q6_K, the most used, have tuned loops here instead.
// Several: 8 weight rows unpacked to a panel with the rows in the lanes, so that nothing is added across lanes.

#include <immintrin.h>
#include <math.h>
#include <cstring>
#include <type_traits>

#include "codebooks.h"
#include "kernels.h"

namespace prima {
namespace avx2 {
namespace {

#include "half.h"
#include "lanes_avx2.h"
#include "generic.inl"
#include "bytes_x86.h"
#include "blocks.inl"

inline __m256i add_pairs(__m256i sum, __m256i words, __m256i scales) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(words, scales));
}
constexpr bool kDotsAnyBytes = false;
inline __m256i dot_bytes(__m256i codes, __m256i x) {
    return _mm256_madd_epi16(_mm256_maddubs_epi16(codes, x), _mm256_set1_epi16(1));
}

#include "rows_x86.inl"

// sum + scale * (codes . x), where `scales` are words and codes * x fits a word when added in pairs.
inline __m256i add_product(__m256i sum, __m256i codes, __m256i x, __m256i scales) {
    return add_pairs(sum, _mm256_maddubs_epi16(codes, x), scales);
}

// ---------------------------------------------------------------- Q4_K

void dot_q4_rows(const uint8_t* const rows[4], const Activations& a, int64_t t, float out[4]) {
    const __m256i mask = _mm256_set1_epi8(15);
    __m128 total = _mm_setzero_ps();
    const BlockK* x = a.k + t;
    const int64_t n_blocks = a.cols / kKBlock;
    for (int64_t b = 0; b < n_blocks; ++b, x += a.n) {
        const __m128i x_sums = load128(x->sum32);
        const uint8_t* blocks[4];
        __m256i sums[4];
        __m128i lows[4];
        for (int r = 0; r < 4; ++r) {
            const uint8_t* block = blocks[r] = rows[r] + b * Q4_K::kBytes;
            for (int i = 0; i < Q4_K::kBytes; i += 64) prefetch(block + kPrefetchBytes + i);
            uint64_t scales, minima;
            unpack_scales(block + 4, scales, minima);
            lows[r] = _mm_madd_epi16(_mm_cvtepu8_epi16(_mm_cvtsi64_si128((long long)minima)), x_sums);
            const __m256i words = _mm256_broadcastsi128_si256(_mm_cvtepu8_epi16(_mm_cvtsi64_si128((long long)scales)));
            __m256i sum = _mm256_setzero_si256();
            __m256i pick = _mm256_set1_epi16(0x0100);  // the bytes of word 0, in every word
            const __m256i next = _mm256_set1_epi16(0x0202);
            for (int c = 0; c < 4; ++c) {
                const __m256i bytes = load256(block + 16 + 32 * c);
                const __m256i low = _mm256_and_si256(bytes, mask);
                const __m256i high = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask);
                sum = add_product(sum, low, load256(x->q + 64 * c), _mm256_shuffle_epi8(words, pick));
                pick = _mm256_add_epi8(pick, next);
                sum = add_product(sum, high, load256(x->q + 64 * c + 32), _mm256_shuffle_epi8(words, pick));
                pick = _mm256_add_epi8(pick, next);
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

// Codes 0..63 of weights 128 h + 32 i .. + 31, i = 0..3.
inline void unpack_q6(const uint8_t* block, int h, __m256i codes[4]) {
    const __m256i mask = _mm256_set1_epi8(15), high_mask = _mm256_set1_epi8(0x30);
    const __m256i first = load256(block + 64 * h), second = load256(block + 64 * h + 32);
    const __m256i high = load256(block + 128 + 32 * h);
    const auto join = [&](__m256i low, __m256i shifted) {
        return _mm256_or_si256(_mm256_and_si256(low, mask), _mm256_and_si256(shifted, high_mask));
    };
    codes[0] = join(first, _mm256_slli_epi16(high, 4));
    codes[1] = join(second, _mm256_slli_epi16(high, 2));
    codes[2] = join(_mm256_srli_epi16(first, 4), high);
    codes[3] = join(_mm256_srli_epi16(second, 4), _mm256_srli_epi16(high, 2));
}

void dot_q6_rows(const uint8_t* const rows[4], const Activations& a, int64_t t, float out[4]) {
    // Words 0 and 1 of eight scales in the lower and upper lane.
    const __m256i first_pick = _mm256_inserti128_si256(_mm256_set1_epi16(0x0100), _mm_set1_epi16(0x0302), 1);
    const __m256i next = _mm256_set1_epi16(0x0404);
    __m128 total = _mm_setzero_ps();
    const BlockK* x = a.k + t;
    const int64_t n_blocks = a.cols / kKBlock;
    for (int64_t b = 0; b < n_blocks; ++b, x += a.n) {
        const __m256i x_sums = load256(x->sum16);
        const uint8_t* blocks[4];
        __m256i sums[4];
        for (int r = 0; r < 4; ++r) {
            const uint8_t* block = blocks[r] = rows[r] + b * Q6_K::kBytes;
            for (int i = 0; i < Q6_K::kBytes; i += 64) prefetch(block + kPrefetchBytes + i);
            const __m256i scales = _mm256_cvtepi8_epi16(load128(block + 192));
            __m256i sum = _mm256_setzero_si256();
            for (int h = 0; h < 2; ++h) {
                const __m256i words = _mm256_broadcastsi128_si256(h ? _mm256_extracti128_si256(scales, 1)
                                                                    : _mm256_castsi256_si128(scales));
                __m256i codes[4], pick = first_pick;
                unpack_q6(block, h, codes);
                for (int i = 0; i < 4; ++i) {
                    sum =
                        add_product(sum, codes[i], load256(x->q + 128 * h + 32 * i), _mm256_shuffle_epi8(words, pick));
                    pick = _mm256_add_epi8(pick, next);
                }
            }
            // Codes stand for code - 32.
            sums[r] = _mm256_sub_epi32(sum, _mm256_slli_epi32(_mm256_madd_epi16(scales, x_sums), 5));
        }
        const __m128 sum = _mm_cvtepi32_ps(add_across(sums[0], sums[1], sums[2], sums[3]));
        const __m128 term = _mm_mul_ps(load_halves(blocks, 208), sum);
        total = _mm_add_ps(total, _mm_mul_ps(_mm_set1_ps(x->scale), term));
    }
    _mm_storeu_ps(out, total);
}

#include "panel_avx2.inl"

template <class B>
struct Quantised {
    static constexpr MatrixKernels kernels() {
        return {{rows_of<B>()}, dot_panel<B>, B::kIsSlow ? 2 : kPanelFrom, B::kWeights, B::kBytes};
    }
};

constexpr Table kTable = make_table("avx2", all_matrices<Quantised>());

}  // namespace
}  // namespace avx2

const Table& avx2_table() { return avx2::kTable; }

}  // namespace prima
