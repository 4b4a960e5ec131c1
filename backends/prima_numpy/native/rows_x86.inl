// Products of four weight rows with T activation rows, 32 codes at a time. Included inside an x86 variant's namespace,
// which says how products are added up: `add_pairs` of words, and `dot_codes` of two lanes of codes and activations.
//
// Codes never leave the registers: they are taken apart once for all T, and multiplied; pairs of products as words are
// weighed by the group's scale as they are added.

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

template <class B, int T>
inline void dot_big_block(const uint8_t* block, const BlockK* x, __m256i sums[T], __m256i lows[T]) {
    alignas(32) int16_t scales[16], minima[16];
    B::scales(block, scales, minima);
    for (int t = 0; t < T; ++t) sums[t] = _mm256_setzero_si256();
    PRIMA_UNROLL
    for (int i = 0; i < 8; ++i) {
        const __m256i codes = B::codes(block, i).v, words = scale_words<B>(scales, i);
        for (int t = 0; t < T; ++t) {
            sums[t] = add_pairs(sums[t], multiply<B>(codes, load256(x[t].q + 32 * i)), words);
        }
    }
    for (int t = 0; t < T; ++t) {
        if constexpr (B::kOffset != 0) {
            const __m256i offset = _mm256_mullo_epi32(weigh<B>(scales, x[t]), _mm256_set1_epi32(B::kOffset));
            sums[t] = _mm256_sub_epi32(sums[t], offset);
        }
        if constexpr (B::kHasMinima) lows[t] = weigh<B>(minima, x[t]);
    }
}

template <class B>
inline __m128 four_d(const uint8_t* const blocks[4]) {
    if constexpr (B::kHalf >= 0) return load_halves(blocks, B::kHalf);
    return _mm_setr_ps(B::d(blocks[0]), B::d(blocks[1]), B::d(blocks[2]), B::d(blocks[3]));
}
template <class B>
inline __m128 four_dmin(const uint8_t* const blocks[4]) {
    return B::kHasMinima ? load_halves(blocks, B::kHalf + 2) : _mm_setzero_ps();
}

template <class B, int T>
void dot_big_rows(const uint8_t* const rows[4], const Activations& a, int64_t t, float* out) {
    __m128 totals[T];
    for (int i = 0; i < T; ++i) totals[i] = _mm_setzero_ps();
    const BlockK* x = a.k + t;
    for (int64_t b = 0; b < a.cols / kKBlock; ++b, x += a.n) {
        const uint8_t* blocks[4];
        __m256i sums[4][T], lows[4][T];
        for (int r = 0; r < 4; ++r) {
            blocks[r] = rows[r] + b * B::kBytes;
            for (int i = 0; i < B::kBytes; i += 64) prefetch(blocks[r] + kPrefetchBytes + i);
            dot_big_block<B, T>(blocks[r], x, sums[r], lows[r]);
        }
        const __m128 d = four_d<B>(blocks), dmin = four_dmin<B>(blocks);
        for (int i = 0; i < T; ++i) {
            const __m128i sum = add_across(sums[0][i], sums[1][i], sums[2][i], sums[3][i]);
            __m128 term = _mm_mul_ps(d, _mm_cvtepi32_ps(sum));
            if constexpr (B::kHasMinima) {
                const __m128 low = _mm_cvtepi32_ps(add_across(lows[0][i], lows[1][i], lows[2][i], lows[3][i]));
                term = _mm_sub_ps(term, _mm_mul_ps(dmin, low));
            }
            totals[i] = _mm_add_ps(totals[i], _mm_mul_ps(_mm_set1_ps(x[i].scale), term));
        }
    }
    for (int i = 0; i < T; ++i) _mm_storeu_ps(out + 4 * i, totals[i]);
}
