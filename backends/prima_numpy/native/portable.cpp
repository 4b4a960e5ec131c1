// The variant that runs everywhere: plain C++, integers that compilers vectorise.

#include <math.h>
#include <cstring>
#if defined(_M_X64)
#include <intrin.h>
#endif

#include "kernels.h"

namespace prima {
namespace portable {
namespace {

#include "half.h"
#include "lanes_portable.h"
#include "generic.inl"

inline int32_t dot_run(const int8_t* w, const int8_t* x, int n) {
    int32_t sum = 0;
    for (int i = 0; i < n; ++i) sum += int32_t(w[i]) * int32_t(x[i]);
    return sum;
}

// A Q4_K block ready for products: codes 0..15 in the order of the columns.
struct Q4Codes {
    int8_t q[kKBlock];
    uint8_t scales[8], minima[8];
    float d, dmin;

    static constexpr int kBytes = kQ4KBytes;

    explicit Q4Codes(const uint8_t* block) {
        d = half_to_float(load_u16(block));
        dmin = half_to_float(load_u16(block + 2));
        uint64_t s, m;
        unpack_scales(block + 4, s, m);
        std::memcpy(scales, &s, 8);
        std::memcpy(minima, &m, 8);
        for (int c = 0; c < 4; ++c) {
            for (int i = 0; i < 32; ++i) {
                const uint8_t byte = block[16 + 32 * c + i];
                q[64 * c + i] = int8_t(byte & 15);
                q[64 * c + 32 + i] = int8_t(byte >> 4);
            }
        }
    }

    float dot(const BlockK& x) const {
        int32_t sum = 0, low = 0;
        for (int j = 0; j < 8; ++j) {
            sum += scales[j] * dot_run(q + 32 * j, x.q + 32 * j, 32);
            low += minima[j] * x.sum32[j];
        }
        return x.scale * (d * float(sum) - dmin * float(low));
    }
};

// A Q6_K block: codes 0..63, which stand for -32..31.
struct Q6Codes {
    int8_t q[kKBlock];
    int8_t scales[16];
    float d;

    static constexpr int kBytes = kQ6KBytes;

    explicit Q6Codes(const uint8_t* block) {
        std::memcpy(scales, block + 192, 16);
        d = half_to_float(load_u16(block + 208));
        for (int h = 0; h < 2; ++h) {
            const uint8_t* low = block + 64 * h;
            const uint8_t* high = block + 128 + 32 * h;
            for (int i = 0; i < 32; ++i) {
                int8_t* out = q + 128 * h + i;
                out[0] = int8_t((low[i] & 15) | (high[i] & 3) << 4);
                out[32] = int8_t((low[i + 32] & 15) | (high[i] >> 2 & 3) << 4);
                out[64] = int8_t(low[i] >> 4 | (high[i] >> 4 & 3) << 4);
                out[96] = int8_t(low[i + 32] >> 4 | (high[i] >> 6) << 4);
            }
        }
    }

    float dot(const BlockK& x) const {
        int32_t sum = 0;
        for (int j = 0; j < 16; ++j) sum += scales[j] * (dot_run(q + 16 * j, x.q + 16 * j, 16) - 32 * x.sum16[j]);
        return x.scale * (d * float(sum));
    }
};

template <class Codes>
void dot_k_rows(const uint8_t* const rows[4], const Activations& a, int64_t t, float out[4]) {
    for (int r = 0; r < 4; ++r) {
        float total = 0.0f;
        for (int64_t b = 0; b < a.cols / kKBlock; ++b) {
            total += Codes(rows[r] + b * Codes::kBytes).dot(a.k[b * a.n + t]);
        }
        out[r] = total;
    }
}

template <class Codes>
void dot_k_panel(const uint8_t* rows, size_t row_bytes, int n_rows, const Activations& a, float* out,
                 int64_t out_stride) {
    for (int r = 0; r < n_rows; ++r) {
        for (int64_t t = 0; t < a.n; ++t) out[t * out_stride + r] = 0.0f;
        for (int64_t b = 0; b < a.cols / kKBlock; ++b) {
            const Codes codes(rows + size_t(r) * row_bytes + size_t(b) * Codes::kBytes);
            for (int64_t t = 0; t < a.n; ++t) out[t * out_stride + r] += codes.dot(a.k[b * a.n + t]);
        }
    }
}

void dot_q8_rows(const uint8_t* const rows[4], const Activations& a, int64_t t, float out[4]) {
    for (int r = 0; r < 4; ++r) {
        float total = 0.0f;
        for (int64_t b = 0; b < a.cols / kQ8Block; ++b) {
            const uint8_t* block = rows[r] + b * kQ8Bytes;
            const Block8& x = a.q8[b * a.n + t];
            int32_t sum = 0;
            for (int i = 0; i < kQ8Block; ++i) sum += int32_t(int8_t(block[2 + i])) * int32_t(x.q[i]);
            total += x.scale * (half_to_float(load_u16(block)) * float(sum));
        }
        out[r] = total;
    }
}

constexpr Table kTable =
    make_table("portable", {dot_q8_rows, nullptr, 0}, {dot_k_rows<Q4Codes>, dot_k_panel<Q4Codes>, 2},
               {dot_k_rows<Q6Codes>, dot_k_panel<Q6Codes>, 2});

}  // namespace
}  // namespace portable

const Table& portable_table() { return portable::kTable; }

}  // namespace prima
