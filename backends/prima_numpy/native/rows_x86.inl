// Products of four weight rows with one activation row, for every quantised type. Included inside an x86 variant's
// namespace, which says how products are added up: `add_pairs` of words, `dot_bytes` of unsigned and signed bytes.
//
// Codes never leave the registers: 32 at a time they are taken apart and multiplied, pairs of products as words, which
// are weighed by the group's scale as they are added.

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
    return _mm_setr_ps(B::d(blocks[0]), B::d(blocks[1]), B::d(blocks[2]), B::d(blocks[3]));
}
template <class B>
inline __m128 four_dmin(const uint8_t* const blocks[4]) {
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
            if constexpr (B::kIsSigned) {
                sums[r] = dot_bytes(_mm256_abs_epi8(codes), _mm256_sign_epi8(xs, codes));
            } else {
                sums[r] = dot_bytes(codes, xs);
            }
        }
        __m128i sum = add_across(sums[0], sums[1], sums[2], sums[3]);
        if constexpr (B::kOffset != 0) sum = _mm_sub_epi32(sum, _mm_set1_epi32(B::kOffset * x->sum));
        __m128 term = _mm_mul_ps(four_d<B>(blocks), _mm_cvtepi32_ps(sum));
        if constexpr (B::kHasMinima) {
            term = _mm_sub_ps(term, _mm_mul_ps(four_dmin<B>(blocks), _mm_set1_ps(float(x->sum))));
        }
        total = _mm_add_ps(total, _mm_mul_ps(_mm_set1_ps(x->scale), term));
    }
    _mm_storeu_ps(out, total);
}

template <class B>
constexpr DotRows rows_of() {
    if constexpr (B::kWeights == kKBlock) {
        return dot_big_rows<B>;
    } else {
        return dot_small_rows<B>;
    }
}
