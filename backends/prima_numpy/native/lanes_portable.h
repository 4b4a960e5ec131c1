// Sixteen floats as one value, in plain C++. Other variants give `Lanes` the same operations; generic.inl is written
// against them. max(a, b) is b when either is NaN, as on x86. Included inside a variant's namespace.

constexpr int kFloatTile = 4, kFloatWideTile = 4;
constexpr int kScorePositions = 1;  // rows of K by four queries at once
constexpr int kValueVectors = 1;    // Lanes of a row of V by four queries at once

struct Lanes {
    float v[16];

    static Lanes set(float f) {
        Lanes r;
        for (int i = 0; i < 16; ++i) r.v[i] = f;
        return r;
    }
    static Lanes load(const float* p) {
        Lanes r;
        std::memcpy(r.v, p, 64);
        return r;
    }
    static Lanes load_half(const uint16_t* p) {
        Lanes r;
        for (int i = 0; i < 16; ++i) r.v[i] = half_to_float(p[i]);
        return r;
    }
    static Lanes load_bf16(const uint16_t* p) {
        Lanes r;
        for (int i = 0; i < 16; ++i) r.v[i] = float_of_bits(uint32_t(p[i]) << 16);
        return r;
    }
    static Lanes load_int8(const int8_t* p) {
        Lanes r;
        for (int i = 0; i < 16; ++i) r.v[i] = float(p[i]);
        return r;
    }
    static Lanes set_half(uint16_t h) { return set(half_to_float(h)); }
    void store(float* p) const { std::memcpy(p, v, 64); }
    void store_half(uint16_t* p) const {
        for (int i = 0; i < 16; ++i) p[i] = float_to_half(v[i]);
    }
    float sum() const {
        float s[8];
        for (int i = 0; i < 8; ++i) s[i] = v[i] + v[i + 8];
        for (int i = 0; i < 4; ++i) s[i] = s[i] + s[i + 4];
        for (int i = 0; i < 2; ++i) s[i] = s[i] + s[i + 2];
        return s[0] + s[1];
    }
    // Lane l: the sum() of the l-th 16 of 16 * 16 floats.
    static Lanes sums(const float* p) {
        Lanes r;
        for (int i = 0; i < 16; ++i) r.v[i] = load(p + 16 * i).sum();
        return r;
    }
    // 2^k, where the lane is k + 1.5 * 2^23: the integer sits in the low bits of the mantissa.
    Lanes power_of_two() const {
        Lanes r;
        for (int i = 0; i < 16; ++i) r.v[i] = float_of_bits((bits_of_float(v[i]) << 23) + 0x3f800000u);
        return r;
    }
};

inline Lanes operator+(Lanes a, const Lanes& b) {
    for (int i = 0; i < 16; ++i) a.v[i] += b.v[i];
    return a;
}
inline Lanes operator-(Lanes a, const Lanes& b) {
    for (int i = 0; i < 16; ++i) a.v[i] -= b.v[i];
    return a;
}
inline Lanes operator*(Lanes a, const Lanes& b) {
    for (int i = 0; i < 16; ++i) a.v[i] *= b.v[i];
    return a;
}
inline Lanes operator/(Lanes a, const Lanes& b) {
    for (int i = 0; i < 16; ++i) a.v[i] /= b.v[i];
    return a;
}
inline Lanes max(Lanes a, const Lanes& b) {
    for (int i = 0; i < 16; ++i) a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
    return a;
}
inline Lanes min(Lanes a, const Lanes& b) {
    for (int i = 0; i < 16; ++i) a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
    return a;
}
