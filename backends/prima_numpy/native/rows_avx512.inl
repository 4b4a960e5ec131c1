// Products of four weight rows with T activation rows for the K types and IQ4_XS, 64 codes at a time. Included inside
// the AVX-512 variant's namespace behind rows_x86.inl.
//
// Activations are loaded in the order in which the codes come out of a block, so that none of these is moved. The scales
// of four blocks are taken apart at once, a row in each lane, and brought to their words by one byte shuffle.

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

inline __m128i add_across(__m512i a, __m512i b, __m512i c, __m512i d) {
    const __m512i all = add_in_lanes({a}, {b}, {c}, {d}).v;
    const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
    return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}
// The sum of each lane.
inline __m128i add_lanes(__m512i v) {
    v = _mm512_add_epi32(v, _mm512_shuffle_epi32(v, _MM_PERM_BADC));
    v = _mm512_add_epi32(v, _mm512_shuffle_epi32(v, _MM_PERM_CDAB));
    const __m512i firsts = _mm512_castsi128_si512(_mm_setr_epi32(0, 4, 8, 12));
    return _mm512_castsi512_si128(_mm512_permutexvar_epi32(firsts, v));
}

// ---------------------------------------------------------------- codes, and where their activations begin

inline void take_apart(Q2_K, const uint8_t* block, __m512i codes[4]) {
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

inline void take_apart(Q3_K, const uint8_t* block, __m512i codes[4]) {
    const __m512i mask = _mm512_set1_epi8(3), third = _mm512_set1_epi8(4), packed = load512(block + 32);
    const __m512i high = _mm512_srlv_epi16(same256(block), shifts(0, 4));
    codes[0] = join(packed, mask, _mm512_slli_epi16(high, 2), third);
    codes[1] = join(_mm512_srli_epi16(packed, 2), mask, _mm512_slli_epi16(high, 1), third);
    codes[2] = join(_mm512_srli_epi16(packed, 4), mask, high, third);
    codes[3] = join(_mm512_srli_epi16(packed, 6), mask, _mm512_srli_epi16(high, 1), third);
}

inline void take_apart(Q4_K, const uint8_t* block, __m512i codes[4]) {
    const __m512i mask = _mm512_set1_epi8(15);
    for (int h = 0; h < 2; ++h) {
        const __m512i packed = load512(block + 16 + 64 * h);
        codes[2 * h] = _mm512_and_si512(packed, mask);
        codes[2 * h + 1] = _mm512_and_si512(_mm512_srli_epi16(packed, 4), mask);
    }
}

inline void take_apart(Q5_K, const uint8_t* block, __m512i codes[4]) {
    const __m512i mask = _mm512_set1_epi8(15), fifth = _mm512_set1_epi8(16), high = same256(block + 16);
    const __m512i first = load512(block + 48), second = load512(block + 112);
    const __m512i left = _mm512_sllv_epi16(high, shifts(4, 2)), right = _mm512_srlv_epi16(high, shifts(0, 2));
    codes[0] = join(first, mask, left, fifth);
    codes[1] = join(_mm512_srli_epi16(first, 4), mask, _mm512_sllv_epi16(high, shifts(3, 1)), fifth);
    codes[2] = join(second, mask, right, fifth);
    codes[3] = join(_mm512_srli_epi16(second, 4), mask, _mm512_srli_epi16(right, 1), fifth);
}

inline void take_apart(Q6_K, const uint8_t* block, __m512i codes[4]) {
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

// The number of the group of each quarter of the i-th 64 codes.
template <class B>
inline __m512i groups_of(int i, int word_of_zero, int step) {
    constexpr int size = kKBlock / B::kGroups, apart = Order<B>::kApart;
    const int k = Order<B>::first(i);
    const auto word = [&](int column) {
        return (long long)(0x0001000100010001ull * uint64_t(word_of_zero + step * (column / size)));
    };
    const long long a = word(k), b = word(k + 16), c = word(k + apart), d = word(k + apart + 16);
    return _mm512_setr_epi64(a, a, b, b, c, c, d, d);
}

// Scales as bytes with row r in lane r: 16, or 8 and 8 minima. kUpper: signed ones, which are put into the upper half of
// a word, so that all sums are 256 times what they stand for.
template <class B>
struct FourScales {
    static constexpr bool kUpper = false;
    __m512i bytes;

    // Six bits of scales and of minima from 12 bytes: see unpack_scales.
    explicit FourScales(const uint8_t* const blocks[4]) {
        const __m512i heads = four_lanes(blocks, 0);  // units; four scales; four minima; the low bits of the others
        const __m512i first = _mm512_shuffle_epi32(heads, _MM_PERM_ENUM(0xed));   // 1 3 2 3
        const __m512i second = _mm512_shuffle_epi32(heads, _MM_PERM_ENUM(0xa5));  // 1 1 2 2
        const __m512i low = same_dwords(0x3f3f3f3f, 0x0f0f0f0f, 0x3f3f3f3f, 0x0f0f0f0f);
        const __m512i high = same_dwords(0, 0x30303030, 0, 0x30303030);
        bytes = join(_mm512_srlv_epi32(first, same_dwords(0, 0, 0, 4)), low, _mm512_srli_epi32(second, 2), high);
    }
    __m128i lows(const BlockK& x) const {
        const __m512i minima = _mm512_unpackhi_epi8(bytes, _mm512_setzero_si512());
        return add_lanes(_mm512_madd_epi16(minima, same128(x.sum32)));
    }

    static __m512i same_dwords(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
        return _mm512_broadcast_i32x4(_mm_setr_epi32(int(a), int(b), int(c), int(d)));
    }
};

// Words of 16 bytes per lane times the sums of 16 activations, added up in each lane.
inline __m128i weigh_16(__m512i first, __m512i second, const BlockK& x) {
    return add_lanes(_mm512_dpwssd_epi32(_mm512_madd_epi16(first, same128(x.sum16)), second, same128(x.sum16 + 8)));
}

template <>
struct FourScales<Q2_K> {
    static constexpr bool kUpper = false;
    __m512i bytes, minima;

    explicit FourScales(const uint8_t* const blocks[4]) {
        const __m512i mask = _mm512_set1_epi8(15), packed = four_lanes(blocks, 0);
        bytes = _mm512_and_si512(packed, mask);
        minima = _mm512_and_si512(_mm512_srli_epi16(packed, 4), mask);
    }
    __m128i lows(const BlockK& x) const {
        const __m512i zero = _mm512_setzero_si512();
        return weigh_16(_mm512_unpacklo_epi8(minima, zero), _mm512_unpackhi_epi8(minima, zero), x);
    }
};

struct SignedScales {
    static constexpr bool kUpper = true;
    __m512i bytes;

    // The scales times the sums of activations, times 256.
    __m128i lows(const BlockK& x) const {
        const __m512i zero = _mm512_setzero_si512();
        return weigh_16(_mm512_unpacklo_epi8(zero, bytes), _mm512_unpackhi_epi8(zero, bytes), x);
    }
};

template <>
struct FourScales<Q3_K> : SignedScales {
    explicit FourScales(const uint8_t* const blocks[4]) {
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

template <>
struct FourScales<Q6_K> : SignedScales {
    explicit FourScales(const uint8_t* const blocks[4]) { bytes = four_lanes(blocks, 192); }
};

// ---------------------------------------------------------------- K types

template <class B, int T>
inline void dot_codes_of_row(const uint8_t* block, __m512i bytes, const __m512i xs[T][4], __m512i sums[T]) {
    __m512i codes[4];
    take_apart(B(), block, codes);
    for (int t = 0; t < T; ++t) sums[t] = _mm512_setzero_si512();
    PRIMA_UNROLL
    for (int i = 0; i < 4; ++i) {
        __m512i words;
        if constexpr (std::is_same_v<B, Q6_K>) {  // 256 times its sums would not fit
            words = _mm512_permutexvar_epi16(groups_of<B>(i, 0, 1), bytes);
        } else if constexpr (FourScales<B>::kUpper) {
            words = _mm512_shuffle_epi8(bytes, groups_of<B>(i, 0x0080, 0x0100));
        } else {
            words = _mm512_shuffle_epi8(bytes, groups_of<B>(i, 0x8000, 1));
        }
        for (int t = 0; t < T; ++t) {
            sums[t] = _mm512_dpwssd_epi32(sums[t], _mm512_maddubs_epi16(codes[i], xs[t][i]), words);
        }
    }
}

template <class B, int T>
inline void add_big_blocks(const uint8_t* const blocks[4], const BlockK* x, __m128 totals[T]) {
    __m512i xs[T][4], sums[4][T];
    for (int t = 0; t < T; ++t) {
        for (int i = 0; i < 4; ++i) {
            const int8_t* q = x[t].q + Order<B>::first(i);
            xs[t][i] = Order<B>::kApart == 32 ? load512(q) : load_apart(q, q + Order<B>::kApart);
        }
    }
    const FourScales<B> scales(blocks);
    const __m512i row[4] = {
        _mm512_shuffle_i32x4(scales.bytes, scales.bytes, 0x00), _mm512_shuffle_i32x4(scales.bytes, scales.bytes, 0x55),
        _mm512_shuffle_i32x4(scales.bytes, scales.bytes, 0xaa), _mm512_shuffle_i32x4(scales.bytes, scales.bytes, 0xff)};
    PRIMA_UNROLL
    for (int r = 0; r < 4; ++r) {
        if constexpr (std::is_same_v<B, Q6_K>) {
            const __m256i words = _mm256_cvtepi8_epi16(load128(blocks[r] + 192));
            dot_codes_of_row<B, T>(blocks[r], _mm512_castsi256_si512(words), xs, sums[r]);
        } else {
            dot_codes_of_row<B, T>(blocks[r], row[r], xs, sums[r]);
        }
    }
    const __m128 d = four_d<B>(blocks), dmin = four_dmin<B>(blocks);
    for (int t = 0; t < T; ++t) {
        const __m128i low = scales.lows(x[t]);
        __m128i sum = add_across(sums[0][t], sums[1][t], sums[2][t], sums[3][t]);
        if constexpr (std::is_same_v<B, Q3_K>) {  // codes stand for code - 4
            sum = _mm_srai_epi32(_mm_sub_epi32(sum, _mm_slli_epi32(low, 2)), 8);
        } else if constexpr (std::is_same_v<B, Q6_K>) {  // code - 32
            sum = _mm_sub_epi32(sum, _mm_srai_epi32(low, 3));
        }
        __m128 term = _mm_mul_ps(d, _mm_cvtepi32_ps(sum));
        if constexpr (B::kHasMinima) term = _mm_sub_ps(term, _mm_mul_ps(dmin, _mm_cvtepi32_ps(low)));
        totals[t] = _mm_add_ps(totals[t], _mm_mul_ps(_mm_set1_ps(x[t].scale), term));
    }
}

// ---------------------------------------------------------------- IQ4_XS

// Its levels are too large for sums of words: four products at a time come as integers, which are multiplied by scales.
template <int T>
inline void add_iq4_xs_blocks(const uint8_t* const blocks[4], const BlockK* x, __m128 totals[T]) {
    const __m512i mask = _mm512_set1_epi8(15), offset = _mm512_set1_epi8(char(128));
    const __m512i levels = _mm512_xor_si512(same128(kIq4Nl), offset), zero = _mm512_setzero_si512();
    const __m256i ones = _mm256_set1_epi32(15), high_mask = _mm256_set1_epi32(48);
    __m512i x_low[T][2], x_high[T][2], start[T][2], sums[4][T];
    for (int t = 0; t < T; ++t) {
        for (int h = 0; h < 2; ++h) {
            const __m512i first = load512(x[t].q + 128 * h), second = load512(x[t].q + 128 * h + 64);
            x_low[t][h] = _mm512_shuffle_i32x4(first, second, 0x88);
            x_high[t][h] = _mm512_shuffle_i32x4(first, second, 0xdd);
            start[t][h] = _mm512_sub_epi32(zero, dot_codes<IQ4_XS>({zero}, {offset}, {offset}, {x_low[t][h]}, {x_high[t][h]}).v);
        }
    }
    PRIMA_UNROLL
    for (int r = 0; r < 4; ++r) {
        const uint8_t* block = blocks[r];
        const __m256i low_bits =
            _mm256_srlv_epi32(_mm256_set1_epi32(int(load_u32(block + 4))), _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
        const __m256i high_bits =
            _mm256_rolv_epi32(_mm256_set1_epi32(int(load_u32(block + 2))), _mm256_setr_epi32(4, 2, 0, 30, 28, 26, 24, 22));
        const __m256i scales = _mm256_sub_epi32(
            _mm256_ternarylogic_epi32(_mm256_and_si256(low_bits, ones), high_bits, high_mask, 0xf8),
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
    const __m128 d = four_d<IQ4_XS>(blocks);
    for (int t = 0; t < T; ++t) {
        const __m128i sum = add_across(sums[0][t], sums[1][t], sums[2][t], sums[3][t]);
        const __m128 term = _mm_mul_ps(d, _mm_cvtepi32_ps(sum));
        totals[t] = _mm_add_ps(totals[t], _mm_mul_ps(_mm_set1_ps(x[t].scale), term));
    }
}

template <class B, int T>
void dot_wide_rows(const uint8_t* const rows[4], const Activations& a, int64_t t, float* out) {
    __m128 totals[T];
    for (int i = 0; i < T; ++i) totals[i] = _mm_setzero_ps();
    const BlockK* x = a.k + t;
    const int64_t n_blocks = a.cols / kKBlock;
    for (int64_t b = 0; b < n_blocks; ++b, x += a.n) {
        const uint8_t* blocks[4];
        for (int r = 0; r < 4; ++r) {
            blocks[r] = rows[r] + b * B::kBytes;
            for (int i = 0; i < B::kBytes; i += 64) prefetch(blocks[r] + kPrefetchBytes + i);
        }
        if constexpr (std::is_same_v<B, IQ4_XS>) {
            add_iq4_xs_blocks<T>(blocks, x, totals);
        } else {
            add_big_blocks<B, T>(blocks, x, totals);
        }
    }
    for (int i = 0; i < T; ++i) _mm_storeu_ps(out + 4 * i, totals[i]);
}
