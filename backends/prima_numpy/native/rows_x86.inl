// Products of four weight rows with one activation row, for every quantised type. Included inside an x86 variant's
// namespace, which says how products are added up: `add_pairs` of words, `dot_bytes` of unsigned and signed bytes, which
// may be any where kDotsAnyBytes; else pairs of products must fit a word.
//
// Codes never leave the registers: 32 at a time they are taken apart and multiplied, pairs of products as words, which
// are weighed by the group's scale as they are added.

inline __m256i load256(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline __m128i load128(const void* p) { return _mm_loadu_si128((const __m128i*)p); }

// The d's of four blocks, `offset` bytes into each.
inline __m128 load_halves(const uint8_t* const blocks[4], int offset) {
    const uint64_t bits = uint64_t(load_u16(blocks[0] + offset)) | uint64_t(load_u16(blocks[1] + offset)) << 16 |
                          uint64_t(load_u16(blocks[2] + offset)) << 32 | uint64_t(load_u16(blocks[3] + offset)) << 48;
    return _mm_cvtph_ps(_mm_cvtsi64_si128((long long)bits));
}

// Sums over all lanes of four vectors, one per lane.
inline __m128i add_across(__m128i a, __m128i b, __m128i c, __m128i d) {
    const __m128i ab = _mm_add_epi32(_mm_unpacklo_epi32(a, b), _mm_unpackhi_epi32(a, b));
    const __m128i cd = _mm_add_epi32(_mm_unpacklo_epi32(c, d), _mm_unpackhi_epi32(c, d));
    return _mm_add_epi32(_mm_unpacklo_epi64(ab, cd), _mm_unpackhi_epi64(ab, cd));
}
inline __m128i add_across(__m256i a, __m256i b, __m256i c, __m256i d) {
    const __m256i ab = _mm256_add_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
    const __m256i cd = _mm256_add_epi32(_mm256_unpacklo_epi32(c, d), _mm256_unpackhi_epi32(c, d));
    const __m256i all = _mm256_add_epi32(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
    return _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
}

inline __m256i broadcast128(const void* p) { return _mm256_broadcastsi128_si256(load128(p)); }

// codes . x in pairs, as words: with kLargest up to 127, or |code| up to 128, no pair leaves a word.
template <class B>
inline __m256i multiply(__m256i codes, __m256i x) {
    if constexpr (B::kIsSigned) {
        return _mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_sign_epi8(x, codes));
    } else {
        return _mm256_maddubs_epi16(codes, x);
    }
}

// The scales of weights 32 i .. + 31 as words, by one shuffle once `i` is known.
template <class B>
inline __m256i scale_words(const int16_t* scales, int i) {
    if constexpr (B::kGroups == 8) {
        return _mm256_shuffle_epi8(broadcast128(scales), _mm256_set1_epi16(short(0x0100 + 0x0202 * i)));
    } else {
        const __m256i first = _mm256_setr_epi64x(0x0100010001000100, 0x0100010001000100,  //
                                                 0x0302030203020302, 0x0302030203020302);
        const __m256i pick = _mm256_add_epi8(first, _mm256_set1_epi16(short(0x0404 * (i % 4))));
        return _mm256_shuffle_epi8(broadcast128(scales + 8 * (i / 4)), pick);
    }
}

// Scales or minima times the sums of their groups' activations.
template <class B>
inline __m256i weigh(const int16_t* values, const BlockK& x) {
    if constexpr (B::kGroups == 8) {
        return _mm256_zextsi128_si256(_mm_madd_epi16(load128(values), load128(x.sum32)));
    } else {
        return _mm256_madd_epi16(load256(values), load256(x.sum16));
    }
}

template <class B>
inline __m256i dot_big_block(const uint8_t* block, const BlockK& x, __m256i& low) {
    alignas(32) int16_t scales[16], minima[16];
    B::scales(block, scales, minima);
    __m256i sum = _mm256_setzero_si256();
    PRIMA_UNROLL
    for (int i = 0; i < 8; ++i) {
        const __m256i words = multiply<B>(B::codes(block, i).v, load256(x.q + 32 * i));
        sum = add_pairs(sum, words, scale_words<B>(scales, i));
    }
    if constexpr (B::kOffset != 0) {
        sum = _mm256_sub_epi32(sum, _mm256_mullo_epi32(weigh<B>(scales, x), _mm256_set1_epi32(B::kOffset)));
    }
    if constexpr (B::kHasMinima) low = weigh<B>(minima, x);
    return sum;
}

template <class B>
inline __m128 four_d(const uint8_t* const blocks[4]) {
    if constexpr (B::kHasHalves) return load_halves(blocks, 0);
    return _mm_setr_ps(B::d(blocks[0]), B::d(blocks[1]), B::d(blocks[2]), B::d(blocks[3]));
}
template <class B>
inline __m128 four_dmin(const uint8_t* const blocks[4]) {
    if constexpr (B::kHasHalves) return _mm_xor_ps(load_halves(blocks, 2), _mm_set1_ps(-0.0f));
    return _mm_setr_ps(B::dmin(blocks[0]), B::dmin(blocks[1]), B::dmin(blocks[2]), B::dmin(blocks[3]));
}

template <class B>
void dot_big_rows(const uint8_t* const rows[4], const Activations& a, int64_t t, float out[4]) {
    __m128 total = _mm_setzero_ps();
    const BlockK* x = a.k + t;
    for (int64_t b = 0; b < a.cols / kKBlock; ++b, x += a.n) {
        const uint8_t* blocks[4];
        __m256i sums[4], lows[4];
        for (int r = 0; r < 4; ++r) {
            blocks[r] = rows[r] + b * B::kBytes;
            for (int i = 0; i < B::kBytes; i += 64) prefetch(blocks[r] + kPrefetchBytes + i);
            sums[r] = dot_big_block<B>(blocks[r], *x, lows[r]);
        }
        __m128 term = _mm_mul_ps(four_d<B>(blocks), _mm_cvtepi32_ps(add_across(sums[0], sums[1], sums[2], sums[3])));
        if constexpr (B::kHasMinima) {
            const __m128 low = _mm_cvtepi32_ps(add_across(lows[0], lows[1], lows[2], lows[3]));
            term = _mm_sub_ps(term, _mm_mul_ps(four_dmin<B>(blocks), low));
        }
        total = _mm_add_ps(total, _mm_mul_ps(_mm_set1_ps(x->scale), term));
    }
    _mm_storeu_ps(out, total);
}

template <class B>
void dot_small_rows(const uint8_t* const rows[4], const Activations& a, int64_t t, float out[4]) {
    __m128 total = _mm_setzero_ps();
    const Block8* x = a.q8 + t;
    for (int64_t b = 0; b < a.cols / kQ8Block; ++b, x += a.n) {
        const __m256i xs = load256(x->q);
        const uint8_t* blocks[4];
        __m256i sums[4];
        for (int r = 0; r < 4; ++r) {
            blocks[r] = rows[r] + b * B::kBytes;
            prefetch(blocks[r] + kPrefetchBytes);
            const __m256i codes = B::codes(blocks[r], 0).v;
            if constexpr (B::kIsSigned && kDotsAnyBytes) {
                sums[r] = dot_bytes(_mm256_xor_si256(codes, _mm256_set1_epi8(int8_t(0x80))), xs);
            } else if constexpr (B::kIsSigned) {
                sums[r] = dot_bytes(_mm256_abs_epi8(codes), _mm256_sign_epi8(xs, codes));
            } else {
                sums[r] = dot_bytes(codes, xs);
            }
        }
        __m128i sum = add_across(sums[0], sums[1], sums[2], sums[3]);
        constexpr int kOffset = B::kIsSigned && kDotsAnyBytes ? 128 : B::kOffset;
        if constexpr (kOffset != 0) sum = _mm_sub_epi32(sum, _mm_set1_epi32(kOffset * x->sum));
        __m128 term = _mm_mul_ps(four_d<B>(blocks), _mm_cvtepi32_ps(sum));
        if constexpr (B::kHasMinima) {
            term = _mm_sub_ps(term, _mm_mul_ps(four_dmin<B>(blocks), _mm_set1_ps(float(x->sum))));
        }
        total = _mm_add_ps(total, _mm_mul_ps(_mm_set1_ps(x->scale), term));
    }
    _mm_storeu_ps(out, total);
}

// The variant's own.
void dot_q4_rows(const uint8_t* const rows[4], const Activations& a, int64_t t, float out[4]);
void dot_q6_rows(const uint8_t* const rows[4], const Activations& a, int64_t t, float out[4]);

template <class B>
constexpr DotRows rows_of() {
    if constexpr (std::is_same_v<B, Q4_K>) {
        return dot_q4_rows;
    } else if constexpr (std::is_same_v<B, Q6_K>) {
        return dot_q6_rows;
    } else if constexpr (B::kWeights == kKBlock) {
        return dot_big_rows<B>;
    } else {
        return dot_small_rows<B>;
    }
}
