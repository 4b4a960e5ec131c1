// Products of four weight rows with T activation rows for the K types and IQ4_XS, 64 codes at a time. Included inside
// the AVX-512 variant's namespace behind rows_x86.inl.
//
// Activations are loaded in the order in which the codes come out of a block, so that none of these is moved. The
// scales of four blocks are taken apart at once, a row in each lane, and brought to their words by one byte shuffle.

inline __m512i load512(const void* p) { return _mm512_loadu_si512(p); }
inline __m512i load_apart(const int8_t* first, const int8_t* second) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(load256(first)), load256(second), 1);
}
inline __m512i same128(const void* p) { return _mm512_broadcast_i32x4(load128(p)); }
inline __m512i same256(const void* p) { return _mm512_broadcast_i64x4(load256(p)); }
inline __m512i halves_of(__m256i lower, __m256i upper) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(lower), upper, 1);
}
inline __m512i four_lanes(const uint8_t* const blocks[4], int offset) {
    __m512i v = _mm512_castsi128_si512(load128(blocks[0] + offset));
    for (int r = 1; r < 4; ++r) {
        const __m512i lane = same128(blocks[r] + offset);
        v = _mm512_mask_blend_epi32(__mmask16(15 << 4 * r), v, lane);
    }
    return v;
}

// ---------------------------------------------------------------- sums, with a lane per activation row

// Sums over all of sums[r][t], where T = 2 twice.
template <int T>
PRIMA_INLINE __m512i add_across(const __m512i sums[4][T]) {
    const auto four = [&](int t) { return add_in_lanes({sums[0][t]}, {sums[1][t]}, {sums[2][t]}, {sums[3][t]}).v; };
    const auto add_pairs_of_lanes = [](__m512i a, __m512i b) {
        return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
    };
    __m512i rows[T];
    for (int t = 0; t < T; ++t) rows[t] = four(t);
    const __m512i first = add_pairs_of_lanes(rows[0], rows[T > 1 ? 1 : 0]);
    const __m512i second = T > 2 ? add_pairs_of_lanes(rows[T - 2 + T % 2], rows[T - 1]) : first;
    return add_pairs_of_lanes(first, second);
}

// Of vectors with a weight row in each lane, the sums over the lanes.
template <int T>
PRIMA_INLINE __m512i add_lanes(const __m512i v[T]) {
    const __m512i zero = _mm512_setzero_si512();
    const __m512i by_row = add_in_lanes({v[0]}, {T > 1 ? v[T > 1 ? 1 : 0] : zero}, {T > 2 ? v[T > 2 ? 2 : 0] : zero},
                                        {T > 3 ? v[T - 1] : zero}).v;
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_permutexvar_epi32(order, by_row);
}

template <int T>
PRIMA_INLINE __m512 scales_of(const BlockK* x) {
    __m512 v = _mm512_set1_ps(x[0].scale);
    for (int t = 1; t < T; ++t) {
        v = _mm512_mask_broadcastss_ps(v, __mmask16(15 << 4 * t), _mm_load_ss(&x[t].scale));
    }
    return v;
}
inline __m512 same_lanes(__m128 v) { return _mm512_broadcast_f32x4(v); }

// ---------------------------------------------------------------- codes, and where their activations begin

PRIMA_INLINE void take_apart(Q2_K, const uint8_t* block, __m512i codes[4]) {
    const __m512i mask = _mm512_set1_epi8(3), packed = load512(block + 16);
    codes[0] = _mm512_and_si512(packed, mask);
    codes[1] = _mm512_and_si512(_mm512_srli_epi16(packed, 2), mask);
    codes[2] = _mm512_and_si512(_mm512_srli_epi16(packed, 4), mask);
    codes[3] = _mm512_and_si512(_mm512_srli_epi16(packed, 6), mask);
}

// (a & b) | (c & d)
inline __m512i join(__m512i a, __m512i b, __m512i c, __m512i d) {
    return _mm512_ternarylogic_epi32(_mm512_and_si512(a, b), c, d, 0xf8);
}
inline __m512i shifts(int lower, int upper) {
    return halves_of(_mm256_set1_epi16(short(lower)), _mm256_set1_epi16(short(upper)));
}

PRIMA_INLINE void take_apart(Q3_K, const uint8_t* block, __m512i codes[4]) {
    const __m512i mask = _mm512_set1_epi8(3), third = _mm512_set1_epi8(4), packed = load512(block + 32);
    const __m512i high = _mm512_srlv_epi16(same256(block), shifts(0, 4));
    codes[0] = join(packed, mask, _mm512_slli_epi16(high, 2), third);
    codes[1] = join(_mm512_srli_epi16(packed, 2), mask, _mm512_slli_epi16(high, 1), third);
    codes[2] = join(_mm512_srli_epi16(packed, 4), mask, high, third);
    codes[3] = join(_mm512_srli_epi16(packed, 6), mask, _mm512_srli_epi16(high, 1), third);
}

PRIMA_INLINE void take_apart(Q4_K, const uint8_t* block, __m512i codes[4]) {
    const __m512i mask = _mm512_set1_epi8(15);
    for (int h = 0; h < 2; ++h) {
        const __m512i packed = load512(block + 16 + 64 * h);
        codes[2 * h] = _mm512_and_si512(packed, mask);
        codes[2 * h + 1] = _mm512_and_si512(_mm512_srli_epi16(packed, 4), mask);
    }
}

PRIMA_INLINE void take_apart(Q5_K, const uint8_t* block, __m512i codes[4]) {
    const __m512i mask = _mm512_set1_epi8(15), fifth = _mm512_set1_epi8(16), high = same256(block + 16);
    const __m512i first = load512(block + 48), second = load512(block + 112);
    const __m512i left = _mm512_sllv_epi16(high, shifts(4, 2)), right = _mm512_srlv_epi16(high, shifts(0, 2));
    codes[0] = join(first, mask, left, fifth);
    codes[1] = join(_mm512_srli_epi16(first, 4), mask, _mm512_sllv_epi16(high, shifts(3, 1)), fifth);
    codes[2] = join(second, mask, right, fifth);
    codes[3] = join(_mm512_srli_epi16(second, 4), mask, _mm512_srli_epi16(right, 1), fifth);
}

PRIMA_INLINE void take_apart(Q6_K, const uint8_t* block, __m512i codes[4]) {
    const __m512i mask = _mm512_set1_epi8(15), high_mask = _mm512_set1_epi8(0x30);
    for (int h = 0; h < 2; ++h) {
        // The same 32 bytes of high bits serve both halves, with two more bits of shift in the upper one.
        const __m512i low = load512(block + 64 * h), high = same256(block + 128 + 32 * h);
        codes[2 * h] = join(low, mask, _mm512_sllv_epi16(high, shifts(4, 2)), high_mask);
        codes[2 * h + 1] =
            join(_mm512_srli_epi16(low, 4), mask, _mm512_srlv_epi16(high, shifts(0, 2)), high_mask);
    }
}

// Of the i-th 64 codes, the first half; the second half begins `kApart` later.
template <class B>
struct Order {
    static constexpr int kApart = 64;  // Q4_K, Q5_K: the low nibbles of 64 bytes, or the high ones
    static constexpr int first(int i) { return 128 * (i / 2) + 32 * (i % 2); }
};
struct Order2Bits {
    static constexpr int kApart = 128;
    static constexpr int first(int i) { return 32 * i; }
};
template <>
struct Order<Q2_K> : Order2Bits {};
template <>
struct Order<Q3_K> : Order2Bits {};
template <>
struct Order<Q6_K> {
    static constexpr int kApart = 32;
    static constexpr int first(int i) { return 64 * i; }
};

// ---------------------------------------------------------------- scales of four blocks

// For the codes 64 (2 j), .. + 127, four products a word: the number of each word's group, times `step`, plus `base`.
template <class B>
PRIMA_INLINE __m512i groups_of(int j, int base, int step) {
    constexpr int size = kKBlock / B::kGroups;
    const auto word = [&](int i, int column) {
        const int group = (Order<B>::first(i) + column) / size;
        return (long long)(0x0001000100010001ull * uint64_t(base + step * group));
    };
    const int first = 2 * j, second = 2 * j + 1, apart = Order<B>::kApart;
    return _mm512_setr_epi64(word(first, 0), word(second, 0), word(first, 16), word(second, 16), word(first, apart),
                             word(second, apart), word(first, apart + 16), word(second, apart + 16));
}

// Scales as bytes with row r in lane r: 16, or 8 and 8 minima.
template <class B>
struct FourScales {
    __m512i bytes;

    // Six bits of scales and of minima from 12 bytes: see unpack_scales.
    PRIMA_INLINE explicit FourScales(const uint8_t* const blocks[4]) {
        const __m512i heads = four_lanes(blocks, 0);  // units; four scales; four minima; the low bits of the others
        const __m512i first = _mm512_shuffle_epi32(heads, _MM_PERM_ENUM(0xed));   // 1 3 2 3
        const __m512i second = _mm512_shuffle_epi32(heads, _MM_PERM_ENUM(0xa5));  // 1 1 2 2
        const __m512i low = same_dwords(0x3f3f3f3f, 0x0f0f0f0f, 0x3f3f3f3f, 0x0f0f0f0f);
        const __m512i high = same_dwords(0, 0x30303030, 0, 0x30303030);
        bytes = join(_mm512_srlv_epi32(first, same_dwords(0, 0, 0, 4)), low, _mm512_srli_epi32(second, 2), high);
    }
    // Minima times the sums of their activations.
    PRIMA_INLINE __m512i lows(const BlockK& x) const {
        const __m512i minima = _mm512_unpackhi_epi8(bytes, _mm512_setzero_si512());
        return _mm512_madd_epi16(minima, same128(x.sum32));
    }

    static __m512i same_dwords(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
        return _mm512_broadcast_i32x4(_mm_setr_epi32(int(a), int(b), int(c), int(d)));
    }
};

template <>
struct FourScales<Q2_K> {
    __m512i bytes, minima;

    PRIMA_INLINE explicit FourScales(const uint8_t* const blocks[4]) {
        const __m512i mask = _mm512_set1_epi8(15), packed = four_lanes(blocks, 0);
        bytes = _mm512_and_si512(packed, mask);
        minima = _mm512_and_si512(_mm512_srli_epi16(packed, 4), mask);
    }
    PRIMA_INLINE __m512i lows(const BlockK& x) const {
        const __m512i zero = _mm512_setzero_si512();
        const __m512i first = _mm512_madd_epi16(_mm512_unpacklo_epi8(minima, zero), same128(x.sum16));
        return _mm512_dpwssd_epi32(first, _mm512_unpackhi_epi8(minima, zero), same128(x.sum16 + 8));
    }
};

template <>
struct FourScales<Q3_K> {
    __m512i bytes;

    PRIMA_INLINE explicit FourScales(const uint8_t* const blocks[4]) {
        const __m512i heads = four_lanes(blocks, 94);  // two codes; 12 bytes of scales; d
        const auto pick = [&](long long lower, long long upper) {
            return _mm512_shuffle_epi8(heads, _mm512_broadcast_i32x4(_mm_set_epi64x(upper, lower)));
        };
        const __m512i nibbles = pick(0x0908070605040302, 0x0908070605040302);
        const __m512i pairs = pick(0x0d0c0b0a0d0c0b0a, 0x0d0c0b0a0d0c0b0a);
        const __m512i low = _mm512_srlv_epi32(nibbles, FourScales<Q4_K>::same_dwords(0, 0, 4, 4));
        const __m512i high = _mm512_rolv_epi32(pairs, FourScales<Q4_K>::same_dwords(4, 2, 0, 30));
        bytes = _mm512_sub_epi8(join(low, _mm512_set1_epi8(15), high, _mm512_set1_epi8(0x30)), _mm512_set1_epi8(32));
    }
};

// ---------------------------------------------------------------- K types

// The scales of a row's j-th 128 codes as words; `bytes` in all lanes. Those of Q3_K are signed and stand in the upper
// bytes: sums are then 256 times what they should be, which still fits an integer. Those of Q6_K, `bytes` as words.
template <class B>
PRIMA_INLINE __m512i scale_words(__m512i bytes, int j) {
    if constexpr (std::is_same_v<B, Q6_K>) return _mm512_permutexvar_epi16(groups_of<B>(j, 0, 1), bytes);
    if constexpr (std::is_same_v<B, Q3_K>) return _mm512_shuffle_epi8(bytes, groups_of<B>(j, 0x0080, 0x0100));
    return _mm512_shuffle_epi8(bytes, groups_of<B>(j, 0x8000, 1));
}

// Activations in the order of the codes, and what a code's offset takes off each four products.
template <class B, int T>
struct WideX {
    __m512i q[T][4], start[T][4];

    PRIMA_INLINE explicit WideX(const BlockK* x) {
        const __m512i zero = _mm512_setzero_si512(), offset = _mm512_set1_epi8(B::kOffset);
        for (int t = 0; t < T; ++t) {
            for (int i = 0; i < 4; ++i) {
                const int8_t* from = x[t].q + Order<B>::first(i);
                q[t][i] = Order<B>::kApart == 32 ? load512(from) : load_apart(from, from + Order<B>::kApart);
                start[t][i] = zero;
                if (B::kOffset != 0) {
                    start[t][i] = _mm512_sub_epi32(zero, _mm512_dpbusd_epi32(zero, offset, q[t][i]));
                }
            }
        }
    }
};

// Four products of codes and activations fit a word, for all types: so two vectors of them are one before they are
// weighed by the scales.
template <class B, int T>
PRIMA_INLINE void dot_codes_of_row(const uint8_t* block, __m512i scales, const WideX<B, T>& x, __m512i sums[T]) {
    __m512i codes[4];
    take_apart(B(), block, codes);
    for (int t = 0; t < T; ++t) sums[t] = _mm512_setzero_si512();
    PRIMA_UNROLL
    for (int j = 0; j < 2; ++j) {
        const __m512i words = scale_words<B>(scales, j);
        for (int t = 0; t < T; ++t) {
            const __m512i first = _mm512_dpbusd_epi32(x.start[t][2 * j], codes[2 * j], x.q[t][2 * j]);
            const __m512i second = _mm512_dpbusd_epi32(x.start[t][2 * j + 1], codes[2 * j + 1], x.q[t][2 * j + 1]);
            sums[t] = _mm512_dpwssd_epi32(sums[t], _mm512_packs_epi32(first, second), words);
        }
    }
}

template <class B, int T>
PRIMA_INLINE __m512 wide_terms(const uint8_t* const blocks[4], const BlockK* x) {
    const WideX<B, T> xs(x);
    __m512i sums[4][T];
    if constexpr (std::is_same_v<B, Q6_K>) {
        PRIMA_UNROLL
        for (int r = 0; r < 4; ++r) {
            const __m512i words = _mm512_castsi256_si512(_mm256_cvtepi8_epi16(load128(blocks[r] + 192)));
            dot_codes_of_row<B, T>(blocks[r], words, xs, sums[r]);
        }
        return _mm512_mul_ps(same_lanes(four_d<B>(blocks)), _mm512_cvtepi32_ps(add_across<T>(sums)));
    } else {
        const FourScales<B> scales(blocks);
        PRIMA_UNROLL
        for (int r = 0; r < 4; ++r) {
            const long long a = 2 * r, b = 2 * r + 1;
            const __m512i lane = _mm512_setr_epi64(a, b, a, b, a, b, a, b);
            dot_codes_of_row<B, T>(blocks[r], _mm512_permutexvar_epi64(lane, scales.bytes), xs, sums[r]);
        }
        __m512i sum = add_across<T>(sums);
        if constexpr (std::is_same_v<B, Q3_K>) sum = _mm512_srai_epi32(sum, 8);
        const __m512 term = _mm512_mul_ps(same_lanes(four_d<B>(blocks)), _mm512_cvtepi32_ps(sum));
        if constexpr (!B::kHasMinima) return term;
        if constexpr (B::kHasMinima) {
            __m512i lows[T];
            for (int t = 0; t < T; ++t) lows[t] = scales.lows(x[t]);
            const __m512 low = _mm512_cvtepi32_ps(add_lanes<T>(lows));
            return _mm512_sub_ps(term, _mm512_mul_ps(same_lanes(four_dmin<B>(blocks)), low));
        }
    }
}

// ---------------------------------------------------------------- IQ4_XS

// Its levels are too large for sums of words: four products at a time come as integers, which are multiplied by scales.
template <int T>
PRIMA_INLINE __m512 iq4_xs_terms(const uint8_t* const blocks[4], const BlockK* x) {
    const __m512i mask = _mm512_set1_epi8(15), offset = _mm512_set1_epi8(char(128));
    const __m512i levels = _mm512_xor_si512(same128(kIq4Nl), offset), zero = _mm512_setzero_si512();
    const __m256i low_mask = _mm256_set1_epi32(15), high_mask = _mm256_set1_epi32(48);
    __m512i x_low[T][2], x_high[T][2], start[T][2], sums[4][T];
    for (int t = 0; t < T; ++t) {
        for (int h = 0; h < 2; ++h) {
            const __m512i first = load512(x[t].q + 128 * h), second = load512(x[t].q + 128 * h + 64);
            x_low[t][h] = _mm512_shuffle_i32x4(first, second, 0x88);
            x_high[t][h] = _mm512_shuffle_i32x4(first, second, 0xdd);
            const Wide taken = dot_codes<IQ4_XS>({zero}, {offset}, {offset}, {x_low[t][h]}, {x_high[t][h]});
            start[t][h] = _mm512_sub_epi32(zero, taken.v);
        }
    }
    PRIMA_UNROLL
    for (int r = 0; r < 4; ++r) {
        const uint8_t* block = blocks[r];
        const __m256i nibbles = _mm256_set1_epi32(int(load_u32(block + 4)));
        const __m256i pairs = _mm256_set1_epi32(int(load_u32(block + 2)));  // in the lower half
        const __m256i low_bits = _mm256_srlv_epi32(nibbles, _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
        const __m256i high_bits = _mm256_rolv_epi32(pairs, _mm256_setr_epi32(4, 2, 0, 30, 28, 26, 24, 22));
        const __m256i scales = _mm256_sub_epi32(
            _mm256_ternarylogic_epi32(_mm256_and_si256(low_bits, low_mask), high_bits, high_mask, 0xf8),
            _mm256_set1_epi32(32));
        PRIMA_UNROLL
        for (int h = 0; h < 2; ++h) {
            const __m512i packed = load512(block + 8 + 64 * h);
            const __m512i low = _mm512_shuffle_epi8(levels, _mm512_and_si512(packed, mask));
            const __m512i high = _mm512_shuffle_epi8(levels, _mm512_and_si512(_mm512_srli_epi16(packed, 4), mask));
            const __m512i index = _mm512_add_epi32(
                _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3), _mm512_set1_epi32(4 * h));
            const __m512i scale = _mm512_permutexvar_epi32(index, _mm512_castsi256_si512(scales));
            for (int t = 0; t < T; ++t) {
                const Wide sum = dot_codes<IQ4_XS>({start[t][h]}, {low}, {high}, {x_low[t][h]}, {x_high[t][h]});
                const __m512i weighed = _mm512_mullo_epi32(sum.v, scale);
                sums[r][t] = h == 0 ? weighed : _mm512_add_epi32(sums[r][t], weighed);
            }
        }
    }
    return _mm512_mul_ps(same_lanes(four_d<IQ4_XS>(blocks)), _mm512_cvtepi32_ps(add_across<T>(sums)));
}

template <class B, int T>
void dot_wide_rows(const uint8_t* const rows[4], const Activations& a, int64_t t, float* out) {
    __m512 totals = _mm512_setzero_ps();  // [activation row][weight row]
    const BlockK* x = a.k + t;
    const int64_t n_blocks = a.cols / kKBlock;
    for (int64_t b = 0; b < n_blocks; ++b, x += a.n) {
        const uint8_t* blocks[4];
        for (int r = 0; r < 4; ++r) {
            blocks[r] = rows[r] + b * B::kBytes;
            for (int i = 0; i < B::kBytes; i += 64) prefetch(blocks[r] + kPrefetchBytes + i);
        }
        __m512 terms;
        if constexpr (std::is_same_v<B, IQ4_XS>) {
            terms = iq4_xs_terms<T>(blocks, x);
        } else {
            terms = wide_terms<B, T>(blocks, x);
        }
        totals = _mm512_add_ps(totals, _mm512_mul_ps(scales_of<T>(x), terms));
    }
    _mm512_mask_storeu_ps(out, __mmask16((1 << 4 * T) - 1), totals);
}
