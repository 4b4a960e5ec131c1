// Products of codes where the CPU has SDOT: each lane adds four. Included inside a NEON variant's namespace.

inline int32x4_t dot16(int8x16_t codes, int8x16_t x) { return vdotq_s32(vdupq_n_s32(0), codes, x); }
template <bool is_narrow>
inline int32x4_t dot32(int8x16_t low, int8x16_t x_low, int8x16_t high, int8x16_t x_high) {
    return vdotq_s32(dot16(low, x_low), high, x_high);
}
