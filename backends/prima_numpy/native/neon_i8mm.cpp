// NEON with SDOT and SMMLA (FEAT_I8MM; Cortex-A710, Neoverse V1, Apple M2): panels by SMMLA, which multiplies two
// weight rows by two activation rows at once. One or two activation rows as neon_dotprod takes them: SMMLA would have
// rows zipped and scales doubled there, which costs about what it saves (by a count of instructions).

#if defined(__aarch64__) || defined(_M_ARM64)  // else empty: see CMakeLists.txt

#include <arm_neon.h>
#include <math.h>
#include <cstring>
#include <type_traits>

#include "codebooks.h"
#include "kernels.h"

namespace prima {
namespace neon_i8mm {
namespace {

#include "half.h"
#include "lanes_neon.h"
#include "generic.inl"
#include "bytes_neon.h"
#include "blocks.inl"
#include "dots_neon.inl"
#include "rows_neon.inl"

inline int8x16_t lower_halves(int8x16_t a, int8x16_t b) {
    return vreinterpretq_s8_s64(vzip1q_s64(vreinterpretq_s64_s8(a), vreinterpretq_s64_s8(b)));
}
inline int8x16_t upper_halves(int8x16_t a, int8x16_t b) {
    return vreinterpretq_s8_s64(vzip2q_s64(vreinterpretq_s64_s8(a), vreinterpretq_s64_s8(b)));
}

// A step is, of each pair of rows, 8 columns of both and then the next 8. A vector has two rows by two activation rows.
struct Tile {
    static constexpr int kVectors = 4, kTokens = 2;
    static int32x4_t spread(int16x8_t rows, int vector) {
        const int16x8_t twice = vector < 2 ? vzip1q_s16(rows, rows) : vzip2q_s16(rows, rows);
        return vmovl_s16(vector % 2 == 0 ? vget_low_s16(twice) : vget_high_s16(twice));
    }

    static void arrange(const int8x16_t rows[8], int8_t* step) {
        for (int v = 0; v < 4; ++v) {
            vst1q_s8(step + 32 * v, lower_halves(rows[2 * v], rows[2 * v + 1]));
            vst1q_s8(step + 32 * v + 16, upper_halves(rows[2 * v], rows[2 * v + 1]));
        }
    }

    template <bool, int n_steps, int T, class X>
    static void multiply(const int8_t* codes, int step, const X* const x[T], int32x4_t sums[4][T / 2]) {
        for (int v = 0; v < 4; ++v) {
            for (int i = 0; i < T / 2; ++i) sums[v][i] = vdupq_n_s32(0);
        }
        for (int s = step; s < step + n_steps; ++s) {
            int8x16_t low[T / 2], high[T / 2];
            for (int i = 0; i < T / 2; ++i) {
                const int8x16_t one = vld1q_s8(x[2 * i]->q + 16 * s), other = vld1q_s8(x[2 * i + 1]->q + 16 * s);
                low[i] = lower_halves(one, other);
                high[i] = upper_halves(one, other);
            }
            for (int v = 0; v < 4; ++v) {
                const int8_t* pair = codes + s * (8 * 16) + 32 * v;
                const int8x16_t first = vld1q_s8(pair), second = vld1q_s8(pair + 16);
                for (int i = 0; i < T / 2; ++i) {
                    sums[v][i] = vmmlaq_s32(vmmlaq_s32(sums[v][i], first, low[i]), second, high[i]);
                }
            }
        }
    }

    template <int T>
    static void sort_by_row(const int32x4_t sums[4][T / 2], int32x4_t by_row[2][T]) {
        for (int v = 0; v < 2; ++v) {
            for (int i = 0; i < T / 2; ++i) {
                by_row[v][2 * i] = vuzp1q_s32(sums[2 * v][i], sums[2 * v + 1][i]);
                by_row[v][2 * i + 1] = vuzp2q_s32(sums[2 * v][i], sums[2 * v + 1][i]);
            }
        }
    }
};

#include "panel_neon.inl"

constexpr Table kTable = make_table("neon_i8mm", all_matrices<Quantised>());

}  // namespace
}  // namespace neon_i8mm

const Table& neon_i8mm_table() { return neon_i8mm::kTable; }

}  // namespace prima

#endif
