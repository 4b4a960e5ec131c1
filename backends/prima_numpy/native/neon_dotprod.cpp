// NEON with SDOT (FEAT_DotProd; Cortex-A55, A76: Raspberry Pi 5; every Apple silicon).

#if defined(__aarch64__) || defined(_M_ARM64)  // else empty: see CMakeLists.txt

#include <arm_neon.h>
#include <math.h>
#include <cstring>
#include <type_traits>

#include "codebooks.h"
#include "kernels.h"

namespace prima {
namespace neon_dotprod {
namespace {

#include "half.h"
#include "lanes_neon.h"
#include "generic.inl"
#include "bytes_neon.h"
#include "blocks.inl"
#include "dots_neon.inl"
#include "rows_neon.inl"

// A step is four columns of four rows after another, rows 0-3 and then 4-7: a lane is a row, and SDOT takes the four
// activations from a lane of theirs.
struct Tile {
    static constexpr int kVectors = 2, kTokens = 1;
    static int32x4_t spread(int16x8_t rows, int vector) {
        return vmovl_s16(vector == 0 ? vget_low_s16(rows) : vget_high_s16(rows));
    }

    static void arrange(const int8x16_t rows[8], int8_t* step) {
        for (int v = 0; v < 2; ++v) transpose(rows + 4 * v, step + 64 * v);
    }

    template <bool, int n_steps, int T, class X>
    static void multiply(const int8_t* codes, int step, const X* const x[T], int32x4_t sums[2][T]) {
        for (int t = 0; t < T; ++t) sums[0][t] = sums[1][t] = vdupq_n_s32(0);
        for (int s = step; s < step + n_steps; ++s) {
            int8x16_t q[T];
            for (int t = 0; t < T; ++t) q[t] = vld1q_s8(x[t]->q + 16 * s);
            for (int v = 0; v < 2; ++v) {
                const int8_t* four_rows = codes + s * (8 * 16) + 64 * v;
                const int8x16_t first = vld1q_s8(four_rows), second = vld1q_s8(four_rows + 16);
                const int8x16_t third = vld1q_s8(four_rows + 32), fourth = vld1q_s8(four_rows + 48);
                for (int t = 0; t < T; ++t) {
                    sums[v][t] = vdotq_laneq_s32(sums[v][t], first, q[t], 0);
                    sums[v][t] = vdotq_laneq_s32(sums[v][t], second, q[t], 1);
                    sums[v][t] = vdotq_laneq_s32(sums[v][t], third, q[t], 2);
                    sums[v][t] = vdotq_laneq_s32(sums[v][t], fourth, q[t], 3);
                }
            }
        }
    }

    template <int T>
    static void sort_by_row(const int32x4_t sums[2][T], int32x4_t by_row[2][T]) {
        for (int v = 0; v < 2; ++v) {
            for (int t = 0; t < T; ++t) by_row[v][t] = sums[v][t];
        }
    }

private:
    static void transpose(const int8x16_t rows[4], int8_t* out) {
        const int32x4_t a = vreinterpretq_s32_s8(rows[0]), b = vreinterpretq_s32_s8(rows[1]);
        const int32x4_t c = vreinterpretq_s32_s8(rows[2]), d = vreinterpretq_s32_s8(rows[3]);
        store_halves(vzip1q_s32(a, b), vzip1q_s32(c, d), out);
        store_halves(vzip2q_s32(a, b), vzip2q_s32(c, d), out + 32);
    }
    static void store_halves(int32x4_t ab, int32x4_t cd, int8_t* out) {
        const int64x2_t first = vreinterpretq_s64_s32(ab), second = vreinterpretq_s64_s32(cd);
        vst1q_s8(out, vreinterpretq_s8_s64(vzip1q_s64(first, second)));
        vst1q_s8(out + 16, vreinterpretq_s8_s64(vzip2q_s64(first, second)));
    }
};

#include "panel_neon.inl"

constexpr Table kTable = make_table("neon_dotprod", all_matrices<Quantised>());

}  // namespace
}  // namespace neon_dotprod

const Table& neon_dotprod_table() { return neon_dotprod::kTable; }

}  // namespace prima

#endif
