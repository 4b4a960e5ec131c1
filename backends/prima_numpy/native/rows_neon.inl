// Products of four weight rows with one or more activation rows, for every quantised type. Included inside a NEON
// variant's namespace, which says how codes are multiplied: `dot16` and `dot32` give sums of 16 and of 32 products in
// four parts. Codes are int8: no type has unsigned ones above 63, and those of kIsNarrow types lie within -64..63.
//
// Codes never leave the registers. Parts of four groups are added together, so that one multiplication weighs all four.

template <class B>
constexpr bool kIsNarrow = !B::kIsSigned;

// Sums over all lanes of four vectors, one per lane.
inline int32x4_t add_across(int32x4_t a, int32x4_t b, int32x4_t c, int32x4_t d) {
    return vpaddq_s32(vpaddq_s32(a, b), vpaddq_s32(c, d));
}

// The d's of four blocks, `offset` bytes into each. Not by way of memory: a load must not span several stores.
inline float32x4_t load_halves(const uint8_t* const blocks[4], int offset) {
    const uint64_t bits = uint64_t(load_u16(blocks[0] + offset)) | uint64_t(load_u16(blocks[1] + offset)) << 16 |
                          uint64_t(load_u16(blocks[2] + offset)) << 32 | uint64_t(load_u16(blocks[3] + offset)) << 48;
    return vcvt_f32_f16(vreinterpret_f16_u64(vcreate_u64(bits)));
}
// Where it lies in a block; below 0: d is no half as it lies there.
template <class B>
constexpr int half_of_d() {
    if constexpr (B::kWeights == kKBlock) {
        return B::kHalf;
    } else {
        return B::kHasHalves ? 0 : -1;
    }
}
template <float (*of)(const uint8_t*)>
inline float32x4_t four(const uint8_t* const blocks[4]) {
    const float values[4] = {of(blocks[0]), of(blocks[1]), of(blocks[2]), of(blocks[3])};
    return vld1q_f32(values);
}
template <class B>
inline float32x4_t four_d(const uint8_t* const blocks[4]) {
    constexpr int kAt = half_of_d<B>();
    if constexpr (kAt >= 0) return load_halves(blocks, kAt);
    return four<B::d>(blocks);
}
template <class B>
inline float32x4_t four_dmin(const uint8_t* const blocks[4]) {
    constexpr int kAt = half_of_d<B>();
    if constexpr (kAt < 0) return four<B::dmin>(blocks);
    const float32x4_t dmin = load_halves(blocks, kAt + 2);
    return B::kWeights == kQ8Block ? vnegq_f32(dmin) : dmin;
}

// ---------------------------------------------------------------- codes

// The low nibble of one byte below the bits of another, and the high one.
inline Bytes insert_above(Bytes nibbles, Bytes bits) {
    return {vsliq_n_u8(nibbles.lo, bits.lo, 4), vsliq_n_u8(nibbles.hi, bits.hi, 4)};
}
inline Bytes insert_below(Bytes nibbles, Bytes bits) {
    return {vsriq_n_u8(bits.lo, nibbles.lo, 4), vsriq_n_u8(bits.hi, nibbles.hi, 4)};
}

// Nibble i % 2, with bit i of `fifth` above it.
inline Bytes join_q5(Bytes nibbles, Bytes fifth, int i) {
    const Bytes bits = fifth.field(i % 2 == 0 ? i : i - 4, 255);
    return (i % 2 == 0 ? insert_above(nibbles, bits) : insert_below(nibbles, bits)).field(0, 31);
}

// Nibble run / 2, with bits 2 run and 2 run + 1 of `high` above it.
inline Bytes join_q6(Bytes nibbles, Bytes high, int run) {
    const Bytes bits = run % 2 == 0 ? high : high.field(2, 63);
    const Bytes code = run < 2 ? insert_above(nibbles, bits) : insert_below(nibbles, bits);
    return run == 3 ? code : code.field(0, 63);
}

// B::codes with one instruction that shifts bits and inserts them where blocks.inl shifts, masks and joins: 129
// instructions per block of Q6_K instead of 154, 134 of Q5_K instead of 143 (gcc 12, SDOT).
template <class B>
inline Bytes codes_of(const uint8_t* block, int i) {
    if constexpr (std::is_same_v<B, Q5_K>) {
        return join_q5(Bytes::load(block + 48 + 32 * (i / 2)), Bytes::load(block + 16), i);
    } else if constexpr (std::is_same_v<B, Q6_K>) {
        const int half = i / 4, run = i % 4;
        return join_q6(Bytes::load(block + 64 * half + 32 * (run % 2)), Bytes::load(block + 128 + 32 * half), run);
    } else {
        return B::codes(block, i);
    }
}

// ---------------------------------------------------------------- blocks of 256

// The scales and minima of a block's groups.
template <class B>
struct GroupWords {
    static constexpr int kVectors = B::kGroups / 8;

    int16x8_t scales[kVectors], minima[kVectors];

    explicit GroupWords(const uint8_t* block) {
        if constexpr (std::is_same_v<B, Q4_K> || std::is_same_v<B, Q5_K>) {
            uint64_t packed_scales, packed_minima;
            unpack_scales(block + 4, packed_scales, packed_minima);
            scales[0] = vreinterpretq_s16_u16(vmovl_u8(vcreate_u8(packed_scales)));
            minima[0] = vreinterpretq_s16_u16(vmovl_u8(vcreate_u8(packed_minima)));
        } else if constexpr (std::is_same_v<B, Q6_K>) {
            const int8x16_t bytes = vld1q_s8((const int8_t*)block + 192);
            scales[0] = vmovl_s8(vget_low_s8(bytes));
            scales[1] = vmovl_s8(vget_high_s8(bytes));
        } else {
            int16_t scale_words[16], minimum_words[16];
            B::scales(block, scale_words, minimum_words);
            for (int i = 0; i < kVectors; ++i) {
                scales[i] = vld1q_s16(scale_words + 8 * i);
                if constexpr (B::kHasMinima) minima[i] = vld1q_s16(minimum_words + 8 * i);
            }
        }
    }

    // The scales of groups 4 i .. 4 i + 3.
    int32x4_t four_scales(int i) const {
        const int16x8_t words = scales[i / 2];
        return i % 2 == 0 ? vmovl_s16(vget_low_s16(words)) : vmovl_s16(vget_high_s16(words));
    }

    // Scales or minima times the sums of their groups' activations, in four parts.
    static int32x4_t weigh(const int16x8_t words[kVectors], const BlockK& x) {
        const int16_t* x_sums = B::kGroups == 8 ? x.sum32 : x.sum16;
        int32x4_t sum = vdupq_n_s32(0);
        for (int i = 0; i < kVectors; ++i) {
            const int16x8_t sums = vld1q_s16(x_sums + 8 * i);
            sum = vmlal_s16(sum, vget_low_s16(words[i]), vget_low_s16(sums));
            sum = vmlal_s16(sum, vget_high_s16(words[i]), vget_high_s16(sums));
        }
        return sum;
    }
};

// sum + codes . x of weights 128 h .. 128 h + 127, weighed.
template <class B>
inline int32x4_t add_half(int32x4_t sum, const Bytes codes[4], const int8_t* x, const GroupWords<B>& groups, int h) {
    int32x4_t parts[8];
    for (int i = 0; i < 4; ++i) {
        const int8x16_t x_low = vld1q_s8(x + 32 * i), x_high = vld1q_s8(x + 32 * i + 16);
        const int8x16_t low = vreinterpretq_s8_u8(codes[i].lo), high = vreinterpretq_s8_u8(codes[i].hi);
        if constexpr (B::kGroups == 8) {
            parts[i] = dot32<kIsNarrow<B>>(low, x_low, high, x_high);
        } else {
            parts[2 * i] = dot16(low, x_low);
            parts[2 * i + 1] = dot16(high, x_high);
        }
    }
    if constexpr (B::kGroups == 8) {
        return vmlaq_s32(sum, add_across(parts[0], parts[1], parts[2], parts[3]), groups.four_scales(h));
    } else {
        sum = vmlaq_s32(sum, add_across(parts[0], parts[1], parts[2], parts[3]), groups.four_scales(2 * h));
        return vmlaq_s32(sum, add_across(parts[4], parts[5], parts[6], parts[7]), groups.four_scales(2 * h + 1));
    }
}

// n activation rows.
template <class B, int n>
void dot_big_rows(const uint8_t* const rows[4], const Activations& a, int64_t t, float* out) {
    float32x4_t totals[n];
    for (int i = 0; i < n; ++i) totals[i] = vdupq_n_f32(0);
    const BlockK* x = a.k + t;
    for (int64_t b = 0; b < a.cols / kKBlock; ++b, x += a.n) {
        const uint8_t* blocks[4];
        int32x4_t sums[n][4], lows[n][4];
        for (int r = 0; r < 4; ++r) {
            const uint8_t* block = blocks[r] = rows[r] + b * B::kBytes;
            for (int i = 0; i < B::kBytes; i += 64) prefetch(block + kPrefetchBytes + i);
            const GroupWords<B> groups(block);
            for (int i = 0; i < n; ++i) sums[i][r] = vdupq_n_s32(0);
            PRIMA_UNROLL
            for (int h = 0; h < 2; ++h) {
                const Bytes codes[4] = {codes_of<B>(block, 4 * h), codes_of<B>(block, 4 * h + 1),
                                        codes_of<B>(block, 4 * h + 2), codes_of<B>(block, 4 * h + 3)};
                for (int i = 0; i < n; ++i) sums[i][r] = add_half<B>(sums[i][r], codes, x[i].q + 128 * h, groups, h);
            }
            for (int i = 0; i < n; ++i) {
                if constexpr (B::kOffset != 0) {
                    sums[i][r] = vmlsq_s32(sums[i][r], groups.weigh(groups.scales, x[i]), vdupq_n_s32(B::kOffset));
                }
                if constexpr (B::kHasMinima) lows[i][r] = groups.weigh(groups.minima, x[i]);
            }
        }
        const float32x4_t d = four_d<B>(blocks);
        for (int i = 0; i < n; ++i) {
            const int32x4_t sum = add_across(sums[i][0], sums[i][1], sums[i][2], sums[i][3]);
            float32x4_t term = vmulq_f32(d, vcvtq_f32_s32(sum));
            if constexpr (B::kHasMinima) {
                const int32x4_t low = add_across(lows[i][0], lows[i][1], lows[i][2], lows[i][3]);
                term = vsubq_f32(term, vmulq_f32(four_dmin<B>(blocks), vcvtq_f32_s32(low)));
            }
            totals[i] = vaddq_f32(totals[i], vmulq_f32(vdupq_n_f32(x[i].scale), term));
        }
    }
    for (int i = 0; i < n; ++i) vst1q_f32(out + 4 * i, totals[i]);
}

// ---------------------------------------------------------------- blocks of 32

template <class B, int n>
void dot_small_rows(const uint8_t* const rows[4], const Activations& a, int64_t t, float* out) {
    float32x4_t totals[n];
    for (int i = 0; i < n; ++i) totals[i] = vdupq_n_f32(0);
    const Block8* x = a.q8 + t;
    for (int64_t b = 0; b < a.cols / kQ8Block; ++b, x += a.n) {
        const uint8_t* blocks[4];
        Bytes codes[4];
        for (int r = 0; r < 4; ++r) {
            blocks[r] = rows[r] + b * B::kBytes;
            prefetch(blocks[r] + kPrefetchBytes);
            codes[r] = B::codes(blocks[r], 0);
        }
        const float32x4_t d = four_d<B>(blocks);
        for (int i = 0; i < n; ++i) {
            const int8x16_t x_low = vld1q_s8(x[i].q), x_high = vld1q_s8(x[i].q + 16);
            int32x4_t parts[4];
            for (int r = 0; r < 4; ++r) {
                parts[r] = dot32<kIsNarrow<B>>(vreinterpretq_s8_u8(codes[r].lo), x_low,
                                               vreinterpretq_s8_u8(codes[r].hi), x_high);
            }
            int32x4_t sum = add_across(parts[0], parts[1], parts[2], parts[3]);
            if constexpr (B::kOffset != 0) sum = vsubq_s32(sum, vdupq_n_s32(B::kOffset * x[i].sum));
            float32x4_t term = vmulq_f32(d, vcvtq_f32_s32(sum));
            if constexpr (B::kHasMinima) {
                term = vsubq_f32(term, vmulq_f32(four_dmin<B>(blocks), vdupq_n_f32(float(x[i].sum))));
            }
            totals[i] = vaddq_f32(totals[i], vmulq_f32(vdupq_n_f32(x[i].scale), term));
        }
    }
    for (int i = 0; i < n; ++i) vst1q_f32(out + 4 * i, totals[i]);
}

template <class B, int n>
constexpr DotRows rows_of() {
    if constexpr (B::kWeights == kKBlock) {
        return dot_big_rows<B, n>;
    } else {
        return dot_small_rows<B, n>;
    }
}
