// `Bytes` (see bytes_portable.h) as two NEON registers. Included inside a variant's namespace.

struct Bytes {
    uint8x16_t lo, hi;

    static Bytes load(const void* p) { return {vld1q_u8((const uint8_t*)p), vld1q_u8((const uint8_t*)p + 16)}; }
    static Bytes set(int value) {
        const uint8x16_t all = vdupq_n_u8(uint8_t(value));
        return {all, all};
    }
    static Bytes of_words(uint64_t a, uint64_t b, uint64_t c, uint64_t d) {
        return {vcombine_u8(vcreate_u8(a), vcreate_u8(b)), vcombine_u8(vcreate_u8(c), vcreate_u8(d))};
    }
    static Bytes nibbles(const uint8_t* p) {
        const uint8x16_t packed = vld1q_u8(p);
        return {vandq_u8(packed, vdupq_n_u8(15)), vshrq_n_u8(packed, 4)};
    }
    static Bytes of_bits(uint32_t bits) {
        const uint8x16_t bytes = vreinterpretq_u8_u32(vdupq_n_u32(bits));
        const uint8x16_t first = vcombine_u8(vcreate_u8(0), vcreate_u8(0x0101010101010101ull));
        const uint8x16_t bit_of = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201ull));
        return {vtstq_u8(vqtbl1q_u8(bytes, first), bit_of),
                vtstq_u8(vqtbl1q_u8(bytes, vaddq_u8(first, vdupq_n_u8(2))), bit_of)};
    }
    Bytes field(int shift, int mask) const {
        Bytes r = *this;
        if (shift != 0) {
            const int8x16_t left = vdupq_n_s8(int8_t(-shift));
            r = {vshlq_u8(r.lo, left), vshlq_u8(r.hi, left)};
        }
        // Known when compiled: no other bits are left.
        if (mask == 255 || (shift > 0 && mask == 255 >> shift)) return r;
        const uint8x16_t kept = vdupq_n_u8(uint8_t(mask));
        return {vandq_u8(r.lo, kept), vandq_u8(r.hi, kept)};
    }
    Bytes look_up(const int8_t* table) const {
        const uint8x16_t levels = vld1q_u8((const uint8_t*)table);
        return {vqtbl1q_u8(levels, lo), vqtbl1q_u8(levels, hi)};
    }
    void store(void* p) const {
        vst1q_u8((uint8_t*)p, lo);
        vst1q_u8((uint8_t*)p + 16, hi);
    }
};

inline Bytes operator|(Bytes a, Bytes b) { return {vorrq_u8(a.lo, b.lo), vorrq_u8(a.hi, b.hi)}; }
inline Bytes operator+(Bytes a, Bytes b) { return {vaddq_u8(a.lo, b.lo), vaddq_u8(a.hi, b.hi)}; }
inline Bytes negate_where(Bytes minus, Bytes a) {
    return {vsubq_u8(veorq_u8(a.lo, minus.lo), minus.lo), vsubq_u8(veorq_u8(a.hi, minus.hi), minus.hi)};
}

inline float half_at(const uint8_t* p) {
    return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(load_u16(p)))), 0);
}
