// `Lanes` (see lanes_portable.h) as four NEON registers. Included inside the variant's namespace.

constexpr int kFloatTile = 2, kFloatWideTile = 2;  // 4 totals of four registers each, of 32
constexpr int kScorePositions = 1;
constexpr int kValueVectors = 1;

struct Lanes {
    float32x4_t v[4];

    static Lanes set(float f) {
        const float32x4_t all = vdupq_n_f32(f);
        return {{all, all, all, all}};
    }
    static Lanes load(const float* p) {
        return {{vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}};
    }
    static float32x4_t widen_half(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
    static Lanes load_half(const uint16_t* p) {
        return {{widen_half(p), widen_half(p + 4), widen_half(p + 8), widen_half(p + 12)}};
    }
    static float32x4_t widen_bf16(const uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
    static Lanes load_bf16(const uint16_t* p) {
        return {{widen_bf16(p), widen_bf16(p + 4), widen_bf16(p + 8), widen_bf16(p + 12)}};
    }
    static Lanes load_int8(const int8_t* p) {
        const int8x16_t bytes = vld1q_s8(p);
        const int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_s8(vget_high_s8(bytes));
        return {{vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(low))),
                 vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(high)))}};
    }
    static Lanes set_half(uint16_t h) {
        const float32x4_t all = vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(h)));
        return {{all, all, all, all}};
    }
    void store(float* p) const {
        for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, v[i]);
    }
    void store_half(uint16_t* p) const {
        for (int i = 0; i < 4; ++i) vst1_u16(p + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(v[i])));
    }
    float sum() const {
        const float32x4_t four = fours();
        const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
        return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
    }
    float32x4_t fours() const { return vaddq_f32(vaddq_f32(v[0], v[2]), vaddq_f32(v[1], v[3])); }
    static float32x4_t twos(const float* p) {
        const float32x4_t a = load(p).fours(), b = load(p + 16).fours();
        return vaddq_f32(vcombine_f32(vget_low_f32(a), vget_low_f32(b)),
                         vcombine_f32(vget_high_f32(a), vget_high_f32(b)));
    }
    static Lanes sums(const float* p) {
        Lanes r;
        for (int i = 0; i < 4; ++i) r.v[i] = vpaddq_f32(twos(p + 64 * i), twos(p + 64 * i + 32));
        return r;
    }
    Lanes power_of_two() const {
        Lanes r;
        for (int i = 0; i < 4; ++i) {
            const int32x4_t exponent = vshlq_n_s32(vreinterpretq_s32_f32(v[i]), 23);
            r.v[i] = vreinterpretq_f32_s32(vaddq_s32(exponent, vdupq_n_s32(0x3f800000)));
        }
        return r;
    }
};

inline Lanes operator+(Lanes a, const Lanes& b) {
    for (int i = 0; i < 4; ++i) a.v[i] = vaddq_f32(a.v[i], b.v[i]);
    return a;
}
inline Lanes operator-(Lanes a, const Lanes& b) {
    for (int i = 0; i < 4; ++i) a.v[i] = vsubq_f32(a.v[i], b.v[i]);
    return a;
}
inline Lanes operator*(Lanes a, const Lanes& b) {
    for (int i = 0; i < 4; ++i) a.v[i] = vmulq_f32(a.v[i], b.v[i]);
    return a;
}
inline Lanes operator/(Lanes a, const Lanes& b) {
    for (int i = 0; i < 4; ++i) a.v[i] = vdivq_f32(a.v[i], b.v[i]);
    return a;
}
// Not vmaxq and vminq, which give NaN when either is.
inline Lanes max(Lanes a, const Lanes& b) {
    for (int i = 0; i < 4; ++i) a.v[i] = vbslq_f32(vcgtq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]);
    return a;
}
inline Lanes min(Lanes a, const Lanes& b) {
    for (int i = 0; i < 4; ++i) a.v[i] = vbslq_f32(vcltq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]);
    return a;
}
