// The variant that runs everywhere: plain C++, integers that compilers vectorise.

#include <math.h>
#include <cstring>
#include <type_traits>
#if defined(_M_X64)
#include <intrin.h>
#endif

#include "codebooks.h"
#include "kernels.h"

namespace prima {
namespace portable {
namespace {

#include "half.h"
#include "lanes_portable.h"
#include "generic.inl"
#include "bytes_portable.h"
#include "blocks.inl"

// A block taken apart: codes in the order of the columns.
template <class B>
struct Unpacked {
    using Code = std::conditional_t<B::kIsSigned, int8_t, uint8_t>;

    Code codes[B::kWeights];
    int16_t scales[16], minima[16];
    float d, dmin;

    explicit Unpacked(const uint8_t* block) : d(B::d(block)), dmin(B::dmin(block)) {
        PRIMA_UNROLL  // then shifts are by constants
        for (int i = 0; i < B::kWeights / 32; ++i) B::codes(block, i).store(codes + 32 * i);
        if constexpr (B::kWeights == kKBlock) B::scales(block, scales, minima);
    }

    float dot(const BlockK& x) const {
        constexpr int size = kKBlock / B::kGroups;
        const int16_t* x_sums = B::kGroups == 8 ? x.sum32 : x.sum16;
        int32_t sum = 0, low = 0;
        for (int j = 0; j < B::kGroups; ++j) {
            sum += scales[j] * (dot_run<size>(codes + size * j, x.q + size * j) - B::kOffset * x_sums[j]);
            if constexpr (B::kHasMinima) low += minima[j] * x_sums[j];
        }
        return term(x.scale, sum, low);
    }
    float dot(const Block8& x) const {
        return term(x.scale, dot_run<kQ8Block>(codes, x.q) - B::kOffset * x.sum, x.sum);
    }

    // Multiplied in the order of ggml's reference.
    void weights(float* out) const {
        if constexpr (B::kWeights == kKBlock) {
            constexpr int size = kKBlock / B::kGroups;
            for (int j = 0; j < B::kGroups; ++j) {
                const float low = B::kHasMinima ? dmin * float(minima[j]) : 0.0f;
                weigh<size>(codes + size * j, d * float(scales[j]), low, out + size * j);
            }
        } else {
            weigh<kQ8Block>(codes, d, dmin, out);
        }
    }

private:
    template <int n>
    static int32_t dot_run(const Code* w, const int8_t* x) {
        int32_t sum = 0;
        for (int i = 0; i < n; ++i) sum += int32_t(w[i]) * int32_t(x[i]);
        return sum;
    }
    template <int n>
    static void weigh(const Code* w, float step, float low, float* out) {
        for (int i = 0; i < n; ++i) {
            out[i] = step * float(int32_t(w[i]) - B::kOffset);
            if constexpr (B::kHasMinima) out[i] -= low;
        }
    }
    float term(float x_scale, int32_t sum, int32_t low) const {
        if constexpr (B::kHasMinima) {
            return x_scale * (d * float(sum) - dmin * float(low));
        } else {
            return x_scale * (d * float(sum));
        }
    }
};

template <class B>
void dot_rows(const uint8_t* const rows[4], const Activations& a, int64_t t, float out[4]) {
    const typename B::X* x = B::activations(a) + t;
    for (int r = 0; r < 4; ++r) {
        float total = 0.0f;
        for (int64_t b = 0; b < a.cols / B::kWeights; ++b) total += Unpacked<B>(rows[r] + b * B::kBytes).dot(x[b * a.n]);
        out[r] = total;
    }
}

template <class B>
void dot_panel(const uint8_t* rows, size_t row_bytes, int n_rows, const Activations& a, float* out,
               int64_t out_stride) {
    for (int r = 0; r < n_rows; ++r) {
        for (int64_t t = 0; t < a.n; ++t) out[t * out_stride + r] = 0.0f;
        for (int64_t b = 0; b < a.cols / B::kWeights; ++b) {
            const Unpacked<B> block(rows + size_t(r) * row_bytes + size_t(b) * B::kBytes);
            const typename B::X* x = B::activations(a) + b * a.n;
            for (int64_t t = 0; t < a.n; ++t) out[t * out_stride + r] += block.dot(x[t]);
        }
    }
}

template <class B>
void row_weights(const uint8_t* row, int64_t cols, float* out) {
    for (int64_t b = 0; b < cols / B::kWeights; ++b) {
        Unpacked<B>(row + b * B::kBytes).weights(out + b * B::kWeights);
    }
}

void row_of_f32(const uint8_t* row, int64_t cols, float* out) { std::memcpy(out, row, size_t(cols) * sizeof(float)); }

void row_of_f16(const uint8_t* row, int64_t cols, float* out) {
    for (int64_t i = 0; i < cols; ++i) out[i] = half_at(row + 2 * i);
}

void row_of_bf16(const uint8_t* row, int64_t cols, float* out) {
    for (int64_t i = 0; i < cols; ++i) out[i] = float_of_bits(uint32_t(load_u16(row + 2 * i)) << 16);
}

template <class B>
struct Quantised {
    static constexpr MatrixKernels kernels() {
        return {{dot_rows<B>}, dot_panel<B>, 2, B::kWeights, B::kBytes, kPanelRows, row_weights<B>};
    }
};

constexpr Matrices matrices() {
    Matrices m = all_matrices<Quantised>();
    m.of[int(Type::F32)].weights = row_of_f32;
    m.of[int(Type::F16)].weights = row_of_f16;
    m.of[int(Type::BF16)].weights = row_of_bf16;
    return m;
}

constexpr Table kTable = make_table("portable", matrices());

}  // namespace
}  // namespace portable

const Table& portable_table() { return portable::kTable; }

}  // namespace prima
