// IEEE half precision by bit operations, for code that may not assume F16C or NEON. Included inside a variant's
// namespace (see generic.inl): a shared inline function could be linked from the variant with the newest instructions.

inline float float_of_bits(uint32_t bits) {
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

inline uint32_t bits_of_float(float f) {
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    return bits;
}

inline uint16_t load_u16(const uint8_t* p) {
    uint16_t v;
    std::memcpy(&v, p, 2);
    return v;
}

inline float half_to_float(uint16_t h) {
    const uint32_t sign = uint32_t(h & 0x8000u) << 16;
    const uint32_t rest = h & 0x7fffu;
    if (rest >= 0x7c00u) return float_of_bits(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
    // 2^112 moves the exponent bias from 15 to 127 and makes subnormals normal; the product is exact.
    return float_of_bits(sign | bits_of_float(float_of_bits(rest << 13) * 5.192296858534828e33f));
}

// Round to nearest even; too large becomes infinite, NaN stays NaN.
inline uint16_t float_to_half(float f) {
    const uint32_t bits = bits_of_float(f);
    const uint16_t sign = uint16_t(bits >> 16 & 0x8000u);
    const uint32_t rest = bits & 0x7fffffffu;
    if (rest > 0x7f800000u) return uint16_t(sign | 0x7e00u | (rest >> 13 & 0x3ffu));
    if (rest >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // 65520 and above
    if (rest < 0x38800000u) {
        // Below 2^-14: adding 0.5 shifts the subnormal's bits to the end of the mantissa and rounds them there.
        return uint16_t(sign | (bits_of_float(float_of_bits(rest) + 0.5f) - 0x3f000000u));
    }
    return uint16_t(sign | ((rest + 0xfffu + (rest >> 13 & 1u) - 0x38000000u) >> 13));
}
