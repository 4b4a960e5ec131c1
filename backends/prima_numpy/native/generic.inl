// What every variant does in the same way, written against `Lanes` and compiled once per variant, inside its namespace.
// No standard library templates here: an inline function of theirs, compiled for AVX-512 in one file, could be the copy
// that the linker keeps for all.

// ---------------------------------------------------------------- lanes at a ragged end

inline Lanes load_some(const float* p, int64_t n) {
    float buffer[16] = {};
    std::memcpy(buffer, p, size_t(n) * 4);
    return Lanes::load(buffer);
}

inline void store_some(const Lanes& v, float* p, int64_t n) {
    float buffer[16];
    v.store(buffer);
    std::memcpy(p, buffer, size_t(n) * 4);
}

// How 16 or fewer values of a stored type become floats.
struct F32Type {
    using Element = float;
    static Lanes load(const float* p) { return Lanes::load(p); }
};
struct F16Type {
    using Element = uint16_t;
    static Lanes load(const uint16_t* p) { return Lanes::load_half(p); }
};
struct BF16Type {
    using Element = uint16_t;
    static Lanes load(const uint16_t* p) { return Lanes::load_bf16(p); }
};

template <class T>
inline Lanes load_some_as(const typename T::Element* p, int64_t n) {
    typename T::Element buffer[16] = {};
    std::memcpy(buffer, p, size_t(n) * sizeof(buffer[0]));
    return T::load(buffer);
}

// ---------------------------------------------------------------- products with float weights

constexpr int64_t kPrefetchBytes = 1024;

inline void prefetch(const void* p) {
#if defined(__GNUC__) || defined(__clang__)
    __builtin_prefetch(p);
#elif defined(_M_X64)
    _mm_prefetch((const char*)p, _MM_HINT_T0);
#elif defined(_M_ARM64)
    __prefetch(p);
#else
    (void)p;
#endif
}

template <class T, int n>
void dot_float_rows(const uint8_t* const rows[4], const Activations& a, int64_t t, float* out) {
    using Element = typename T::Element;  // GGUF aligns tensors, but loads do not count on it
    const float* x = a.x + t * a.cols;
    Lanes total[n][4];
    for (auto& row : total) {
        for (auto& lanes : row) lanes = Lanes::set(0);
    }
    int64_t c = 0;
    for (; c + 16 <= a.cols; c += 16) {
        Lanes xs[n];
        for (int i = 0; i < n; ++i) xs[i] = Lanes::load(x + i * a.cols + c);
        for (int r = 0; r < 4; ++r) {
            const uint8_t* w = rows[r] + c * int64_t(sizeof(Element));
            prefetch(w + kPrefetchBytes);
            const Lanes ws = T::load((const Element*)w);
            for (int i = 0; i < n; ++i) total[i][r] = total[i][r] + ws * xs[i];
        }
    }
    if (c < a.cols) {
        for (int r = 0; r < 4; ++r) {
            const Lanes ws = load_some_as<T>((const Element*)(rows[r] + c * int64_t(sizeof(Element))), a.cols - c);
            for (int i = 0; i < n; ++i) {
                total[i][r] = total[i][r] + ws * load_some(x + i * a.cols + c, a.cols - c);
            }
        }
    }
    for (int i = 0; i < n; ++i) {
        for (int r = 0; r < 4; ++r) out[4 * i + r] = total[i][r].sum();
    }
}

// kFloatTile weight rows by n activation rows: each loaded value serves as often.
template <class T, int n>
void dot_float_tile(const typename T::Element* const w[kFloatTile], const float* const x[n], int64_t cols,
                    float out[n][kFloatTile]) {
    Lanes total[n][kFloatTile];
    for (auto& row : total) {
        for (auto& lanes : row) lanes = Lanes::set(0);
    }
    const auto add_products = [&](const Lanes ws[kFloatTile], const Lanes& xs, int t) {
        for (int r = 0; r < kFloatTile; ++r) total[t][r] = total[t][r] + ws[r] * xs;
    };
    Lanes ws[kFloatTile];
    int64_t c = 0;
    for (; c + 16 <= cols; c += 16) {
        for (int r = 0; r < kFloatTile; ++r) ws[r] = T::load(w[r] + c);
        for (int t = 0; t < n; ++t) add_products(ws, Lanes::load(x[t] + c), t);
    }
    if (c < cols) {
        for (int r = 0; r < kFloatTile; ++r) ws[r] = load_some_as<T>(w[r] + c, cols - c);
        for (int t = 0; t < n; ++t) add_products(ws, load_some(x[t] + c, cols - c), t);
    }
    for (int t = 0; t < n; ++t) {
        for (int r = 0; r < kFloatTile; ++r) out[t][r] = total[t][r].sum();
    }
}

// n_rows weight rows by n activation rows from t0 on; past the last, it again.
template <class T, int n>
void dot_float_tiles(const uint8_t* rows, size_t row_bytes, int n_rows, const Activations& a, int64_t t0, float* out,
                     int64_t out_stride) {
    const float* x[n];
    for (int t = 0; t < n; ++t) x[t] = a.x + (t0 + t < a.n ? t0 + t : a.n - 1) * a.cols;
    for (int r0 = 0; r0 < n_rows; r0 += kFloatTile) {
        const typename T::Element* w[kFloatTile];
        for (int r = 0; r < kFloatTile; ++r) {
            w[r] = (const typename T::Element*)(rows + size_t(r0 + r < n_rows ? r0 + r : n_rows - 1) * row_bytes);
        }
        float tile[n][kFloatTile];
        dot_float_tile<T, n>(w, x, a.cols, tile);
        for (int t = 0; t < n && t0 + t < a.n; ++t) {
            for (int r = 0; r < kFloatTile && r0 + r < n_rows; ++r) out[(t0 + t) * out_stride + r0 + r] = tile[t][r];
        }
    }
}

template <class T>
void dot_float_panel(const uint8_t* rows, size_t row_bytes, int n_rows, const Activations& a, float* out,
                     int64_t out_stride) {
    for (int64_t t = 0; t < a.n;) {
        const int64_t left = a.n - t;
        if (left >= kFloatWideTile && left != 2 * kFloatTile) {
            dot_float_tiles<T, kFloatWideTile>(rows, row_bytes, n_rows, a, t, out, out_stride);
            t += kFloatWideTile;
        } else {
            dot_float_tiles<T, kFloatTile>(rows, row_bytes, n_rows, a, t, out, out_stride);
            t += kFloatTile;
        }
    }
}

constexpr int kFloatPanelRows = 64;  // weight rows that stay in L2 while all activation rows, a larger stream, pass by

template <class T>
constexpr MatrixKernels float_kernels() {
    return {{dot_float_rows<T, 1>, dot_float_rows<T, 2>, dot_float_rows<T, 3>, dot_float_rows<T, 4>},
            dot_float_panel<T>,
            2 * kTogether + 1,
            1,
            int(sizeof(typename T::Element)),
            kFloatPanelRows};
}

// ---------------------------------------------------------------- quantised activations

// The largest magnitude as bits, which order like the values, NaN above all.
inline uint32_t largest_magnitude(const float* x, int n) {
    uint32_t largest = 0;
    for (int i = 0; i < n; ++i) {
        const uint32_t bits = bits_of_float(x[i]) & 0x7fffffffu;
        largest = largest > bits ? largest : bits;
    }
    return largest;
}

// q = round(x * 127 / largest) to even; returns the scale. A run with NaN or infinity gets q = 0 and scale NaN, so that
// the result is NaN too; below 1e-30, where 127 / largest could overflow, all is 0.
inline float quantize_run(const float* x, int n, int8_t* q) {
    const uint32_t bits = largest_magnitude(x, n);
    const float largest = float_of_bits(bits);
    const bool is_finite = bits < 0x7f800000u;
    if (!is_finite || largest < 1e-30f) {
        std::memset(q, 0, size_t(n));
        return is_finite ? 0.0f : float_of_bits(0x7fc00000u);
    }
    const float inverse = 127.0f / largest;
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    for (int i = 0; i < n; ++i) q[i] = int8_t(int32_t((x[i] * inverse + magic) - magic));
    return largest / 127.0f;
}

void quantize_k(const Activations& a, int64_t t0, int64_t t1, BlockK* out) {
    for (int64_t t = t0; t < t1; ++t) {
        for (int64_t b = 0; b < a.cols / kKBlock; ++b) {
            BlockK& block = out[b * a.n + t];
            block.scale = quantize_run(a.x + t * a.cols + b * kKBlock, kKBlock, block.q);
            for (int j = 0; j < 16; ++j) {
                int sum = 0;
                for (int i = 0; i < 16; ++i) sum += block.q[16 * j + i];
                block.sum16[j] = int16_t(sum);
            }
            for (int j = 0; j < 8; ++j) block.sum32[j] = int16_t(block.sum16[2 * j] + block.sum16[2 * j + 1]);
        }
    }
}

void quantize_8(const Activations& a, int64_t t0, int64_t t1, Block8* out) {
    for (int64_t t = t0; t < t1; ++t) {
        for (int64_t b = 0; b < a.cols / kQ8Block; ++b) {
            Block8& block = out[b * a.n + t];
            block.scale = quantize_run(a.x + t * a.cols + b * kQ8Block, kQ8Block, block.q);
            int sum = 0;
            for (int i = 0; i < kQ8Block; ++i) sum += block.q[i];
            block.sum = sum;
        }
    }
}

// ---------------------------------------------------------------- elementwise and norms

// e^x = (1 + less_one) * power for x in [-87, 88], clamped to that range; NaN stays NaN. Cephes' expf polynomial.
struct Exp {
    Lanes less_one, power;
};

inline Exp exp_parts(Lanes x) {
    const Lanes magic = Lanes::set(12582912.0f);
    x = min(Lanes::set(88.0f), max(Lanes::set(-87.0f), x));
    const Lanes shifted = x * Lanes::set(1.44269504088896341f) + magic;
    const Lanes k = shifted - magic;
    const Lanes r = x - k * Lanes::set(0.693359375f) - k * Lanes::set(-2.12194440e-4f);
    Lanes p = Lanes::set(1.9875691500e-4f);
    p = p * r + Lanes::set(1.3981999507e-3f);
    p = p * r + Lanes::set(8.3334519073e-3f);
    p = p * r + Lanes::set(4.1665795894e-2f);
    p = p * r + Lanes::set(1.6666665459e-1f);
    p = p * r + Lanes::set(5.0000001201e-1f);
    return {p * r * r + r, shifted.power_of_two()};
}

// Within 2 ulp.
inline Lanes exp(Lanes x) {
    const Exp e = exp_parts(x);
    return (e.less_one + Lanes::set(1.0f)) * e.power;
}

// (e^2x - 1) / (e^2x + 1), from e^2x - 1 so that small x keep their digits: within 4 ulp.
inline Lanes tanh(Lanes x) {
    const Exp e = exp_parts(x + x);
    const Lanes less_one = e.less_one * e.power + (e.power - Lanes::set(1.0f));
    return less_one / (less_one + Lanes::set(2.0f));
}

void rms_norm(const float* x, const float* gain, int64_t n, int64_t dim, float eps, float* out) {
    for (int64_t t = 0; t < n; ++t, x += dim, out += dim) {
        Lanes squares = Lanes::set(0);
        int64_t i = 0;
        for (; i + 16 <= dim; i += 16) squares = squares + Lanes::load(x + i) * Lanes::load(x + i);
        if (i < dim) {
            const Lanes rest = load_some(x + i, dim - i);
            squares = squares + rest * rest;
        }
        const float scale = 1.0f / sqrtf(squares.sum() / float(dim) + eps);
        const Lanes scales = Lanes::set(scale);
        for (i = 0; i + 16 <= dim; i += 16) (Lanes::load(x + i) * scales * Lanes::load(gain + i)).store(out + i);
        for (; i < dim; ++i) out[i] = x[i] * scale * gain[i];
    }
}

void rope(float* x, const float* cos, const float* sin, int64_t n_heads, int64_t head_dim, int64_t half, bool neox) {
    const int64_t step = neox ? 1 : 2, partner = neox ? half : 1;
    for (int64_t h = 0; h < n_heads; ++h, x += head_dim) {
        for (int64_t i = 0; i < half; ++i) {
            float* p = x + i * step;
            const float a = p[0], b = p[partner];
            p[0] = a * cos[i] - b * sin[i];
            p[partner] = a * sin[i] + b * cos[i];
        }
    }
}

inline Lanes silu(Lanes x) { return x / (Lanes::set(1.0f) + exp(Lanes::set(0.0f) - x)); }

// x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))), as x * sigmoid of twice tanh's argument.
inline Lanes gelu(Lanes x) {
    const Lanes twice = x * (Lanes::set(1.59576912f) + Lanes::set(0.0713548163f) * (x * x));
    return x / (Lanes::set(1.0f) + exp(Lanes::set(0.0f) - twice));
}

template <Lanes (*activate)(Lanes)>
void gated(const float* gate, const float* up, int64_t n, float* out) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) (activate(Lanes::load(gate + i)) * Lanes::load(up + i)).store(out + i);
    if (i < n) store_some(activate(load_some(gate + i, n - i)) * load_some(up + i, n - i), out + i, n - i);
}

void add(const float* x, const float* y, int64_t n, float* out) {
    for (int64_t i = 0; i < n; ++i) out[i] = x[i] + y[i];
}

uint64_t read(const uint8_t* data, int64_t n_lines) {
    const int64_t quarter = n_lines / 4;
    uint64_t sums[4] = {};
    for (int64_t i = 0; i < quarter; ++i) {
        for (int s = 0; s < 4; ++s) {
            const uint8_t* line = data + (s * quarter + i) * 64;
            prefetch(line + kPrefetchBytes);
            uint64_t word;  // the rest of the line comes along
            std::memcpy(&word, line, 8);
            sums[s] += word;
        }
    }
    return sums[0] + sums[1] + sums[2] + sums[3];
}

#include "kv_rows.inl"
#include "attention.inl"

constexpr Table make_table(const char* name, const Matrices& matrices) {
    return {name,
            matrices,
            quantize_k,
            quantize_8,
            rms_norm,
            rope,
            gated<silu>,
            gated<gelu>,
            add,
            attend,
            merge,
            store_row,
            read,
            nullptr,
            nullptr};
}
