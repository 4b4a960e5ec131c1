// Rows of K and V as they are kept: part of generic.inl, which includes it.

// How values of a row of K or V become floats: N times 16 of them, from column c on, where c is a multiple of 16 * N
// and N is 1 or a multiple of kStep, with which scales are looked at once; or fewer than 16. Each 16 lie in kBytes.
template <class T>
struct FloatRow {
    static constexpr int kStep = 1;
    static constexpr int kBytes = 16 * int(sizeof(typename T::Element));

    static const typename T::Element* at(const uint8_t* row, int64_t c) { return (const typename T::Element*)row + c; }
    static int64_t offset(int64_t c) { return c / 16 * kBytes; }
    template <int N>
    static void load(const uint8_t* row, int64_t c, Lanes* values) {
        for (int i = 0; i < N; ++i) values[i] = T::load(at(row, c + 16 * i));
    }
    static Lanes load_some(const uint8_t* row, int64_t c, int64_t n) { return load_some_as<T>(at(row, c), n); }
};
using F32Row = FloatRow<F32Type>;

struct Q8Row {
    static constexpr int kStep = 2;
    static constexpr int kBytes = kQ8Bytes / 2;

    static int64_t offset(int64_t c) { return c / 16 * kBytes; }
    template <int N>
    static void load(const uint8_t* row, int64_t c, Lanes* values) {
        const uint8_t* block = row + c / kQ8Block * kQ8Bytes;
        const int64_t first = N == 1 ? c % kQ8Block : 0;
        for (int i = 0; i < N; i += 2, block += kQ8Bytes) {
            const Lanes scale = Lanes::set_half(load_u16(block));
            const int8_t* codes = (const int8_t*)block + 2 + first;
            for (int l = i; l < N && l < i + 2; ++l) values[l] = Lanes::load_int8(codes + 16 * (l - i)) * scale;
        }
    }
    static Lanes load_some(const uint8_t* row, int64_t c, int64_t) {  // blocks are whole
        Lanes values;
        load<1>(row, c, &values);
        return values;
    }
};

void store_half_row(const float* x, int64_t n, uint8_t* row) {
    auto* out = (uint16_t*)row;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) Lanes::load(x + i).store_half(out + i);
    for (; i < n; ++i) out[i] = float_to_half(x[i]);
}

void store_q8_row(const float* x, int64_t n, uint8_t* row) {
    for (int64_t i = 0; i < n; i += kQ8Block, row += kQ8Bytes) {
        const uint16_t scale = float_to_half(quantize_run(x + i, kQ8Block, (int8_t*)row + 2));
        std::memcpy(row, &scale, 2);
    }
}

void store_row(KvType type, const float* x, int64_t n, uint8_t* out) {
    switch (type) {
        case KvType::F32: std::memcpy(out, x, size_t(n) * 4); return;
        case KvType::F16: store_half_row(x, n, out); return;
        case KvType::Q8_0: store_q8_row(x, n, out); return;
    }
}
