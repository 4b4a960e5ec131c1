// NEON as every 64-bit ARM CPU has it (Cortex-A53, A72: Raspberry Pi 3 and 4). Products of bytes are words; as many are
// added up as fit one before they are widened: 2 of any int8 by -127..127, 4 of codes within -64..63.

#if defined(__aarch64__) || defined(_M_ARM64)  // else empty: see CMakeLists.txt

#include <arm_neon.h>
#include <math.h>
#include <cstring>
#include <type_traits>

#include "codebooks.h"
#include "kernels.h"

namespace prima {
namespace neon {
namespace {

#include "half.h"
#include "lanes_neon.h"
#include "generic.inl"
#include "bytes_neon.h"
#include "blocks.inl"

inline int16x8_t multiply_words(int8x16_t codes, int8x16_t x) {
    return vmlal_high_s8(vmull_s8(vget_low_s8(codes), vget_low_s8(x)), codes, x);
}
inline int32x4_t dot16(int8x16_t codes, int8x16_t x) { return vpaddlq_s16(multiply_words(codes, x)); }
template <bool is_narrow>
inline int32x4_t dot32(int8x16_t low, int8x16_t x_low, int8x16_t high, int8x16_t x_high) {
    if constexpr (is_narrow) {
        const int16x8_t words = vmlal_s8(multiply_words(low, x_low), vget_low_s8(high), vget_low_s8(x_high));
        return vpaddlq_s16(vmlal_high_s8(words, high, x_high));
    } else {
        return vpadalq_s16(dot16(low, x_low), multiply_words(high, x_high));
    }
}

#include "rows_neon.inl"

// A step is 16 codes of one row after the other.
struct Tile {
    static constexpr int kVectors = 2, kTokens = 1;
    static int32x4_t spread(int16x8_t rows, int vector) {
        return vmovl_s16(vector == 0 ? vget_low_s16(rows) : vget_high_s16(rows));
    }

    static void arrange(const int8x16_t rows[8], int8_t* step) {
        for (int r = 0; r < 8; ++r) vst1q_s8(step + 16 * r, rows[r]);
    }

    template <bool is_narrow, int n_steps, int T, class X>
    static void multiply(const int8_t* codes, int step, const X* const x[T], int32x4_t sums[2][T]) {
        codes += step * (8 * 16);
        for (int t = 0; t < T; ++t) {
            const int8_t* q = x[t]->q + 16 * step;
            for (int v = 0; v < 2; ++v) {
                int32x4_t parts[4];
                for (int r = 0; r < 4; ++r) parts[r] = dot_row<is_narrow, n_steps>(codes + 16 * (4 * v + r), q);
                sums[v][t] = add_across(parts[0], parts[1], parts[2], parts[3]);
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
    template <bool is_narrow, int n_steps>
    static int32x4_t dot_row(const int8_t* codes, const int8_t* x) {
        if constexpr (n_steps == 1) {
            return dot16(vld1q_s8(codes), vld1q_s8(x));
        } else {
            return dot32<is_narrow>(vld1q_s8(codes), vld1q_s8(x), vld1q_s8(codes + 8 * 16), vld1q_s8(x + 16));
        }
    }
};

#include "panel_neon.inl"

constexpr Table kTable = make_table("neon", all_matrices<Quantised>());

}  // namespace
}  // namespace neon

const Table& neon_table() { return neon::kTable; }

}  // namespace prima

#endif
