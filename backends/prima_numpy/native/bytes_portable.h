// Thirty-two bytes as one value, in plain C++: what blocks.inl takes blocks apart with. bytes_x86.h gives the same
// operations. Included inside a variant's namespace.

struct Bytes {
    uint8_t v[32];

    static Bytes load(const void* p) {
        Bytes r;
        std::memcpy(r.v, p, 32);
        return r;
    }
    static Bytes set(int value) {
        Bytes r;
        std::memset(r.v, value, 32);
        return r;
    }
    static Bytes of_words(uint64_t a, uint64_t b, uint64_t c, uint64_t d) {
        const uint64_t words[4] = {a, b, c, d};
        return load(words);
    }
    // The low nibbles of 16 bytes, then the high ones.
    static Bytes nibbles(const uint8_t* p) {
        Bytes r;
        for (int i = 0; i < 16; ++i) r.v[i] = p[i] & 15, r.v[i + 16] = p[i] >> 4;
        return r;
    }
    // 255 where a bit is set, else 0; the lowest first.
    static Bytes of_bits(uint32_t bits) {
        Bytes r;
        for (int i = 0; i < 32; ++i) r.v[i] = bits >> i & 1 ? 255 : 0;
        return r;
    }
    // Bits of every byte, moved right by `shift` (left where it is negative), and of these what `mask` has.
    Bytes field(int shift, int mask) const {
        Bytes r;
        for (int i = 0; i < 32; ++i) r.v[i] = uint8_t((shift < 0 ? v[i] << -shift : v[i] >> shift) & mask);
        return r;
    }
    // table[byte] for bytes below 16.
    Bytes look_up(const int8_t* table) const {
        Bytes r;
        for (int i = 0; i < 32; ++i) r.v[i] = uint8_t(table[v[i]]);
        return r;
    }
    void store(void* p) const { std::memcpy(p, v, 32); }
};

inline Bytes operator|(Bytes a, const Bytes& b) {
    for (int i = 0; i < 32; ++i) a.v[i] |= b.v[i];
    return a;
}
inline Bytes operator+(Bytes a, const Bytes& b) {
    for (int i = 0; i < 32; ++i) a.v[i] = uint8_t(a.v[i] + b.v[i]);
    return a;
}
// The byte negated where `minus` is 255.
inline Bytes negate_where(const Bytes& minus, Bytes a) {
    for (int i = 0; i < 32; ++i) a.v[i] = uint8_t((a.v[i] ^ minus.v[i]) - minus.v[i]);
    return a;
}

inline float half_at(const uint8_t* p) { return half_to_float(load_u16(p)); }
