// Activations to int8, as in generic.inl, 16 at a time. Included inside the AVX-512 variant's namespace.

inline __m512i magnitudes(const float* x) { return _mm512_and_si512(load512(x), _mm512_set1_epi32(0x7fffffff)); }

// Whether a run whose largest magnitude has these bits has an inverse: not with NaN or infinity, and not near zero.
inline bool is_usual(uint32_t bits) { return bits < 0x7f800000u && float_of_bits(bits) >= 1e-30f; }

// round(x * inverse) to even: conversions round so.
inline void store_rounded(const float* x, __m512 inverse, int8_t* q) {
    const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x), inverse));
    _mm_storeu_si128((__m128i*)q, _mm512_cvtepi32_epi8(rounded));
}

inline float quantize_256(const float* x, int8_t* q) {
    __m512i largest = magnitudes(x);
    for (int i = 16; i < kKBlock; i += 16) largest = _mm512_max_epu32(largest, magnitudes(x + i));
    const uint32_t bits = _mm512_reduce_max_epu32(largest);
    if (!is_usual(bits)) return quantize_run(x, kKBlock, q);
    const __m512 inverse = _mm512_set1_ps(127.0f / float_of_bits(bits));
    for (int i = 0; i < kKBlock; i += 16) store_rounded(x + i, inverse, q + i);
    return float_of_bits(bits) / 127.0f;
}

inline void sum_256(BlockK& block) {
    const __m512i ones = _mm512_set1_epi8(1), zero = _mm512_setzero_si512();
    __m512i fours[4];
    for (int i = 0; i < 4; ++i) fours[i] = _mm512_dpbusd_epi32(zero, ones, load512(block.q + 64 * i));
    const auto halve = [](__m512i a, __m512i b) {
        return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    };
    const __m512i ab = halve(fours[0], fours[1]), cd = halve(fours[2], fours[3]);
    // Element 4 j + i is of 16 activations from 64 i + 16 j on.
    const __m512i mixed = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m256i sum16 = _mm512_cvtepi32_epi16(_mm512_permutexvar_epi32(order, mixed));
    _mm256_store_si256((__m256i*)block.sum16, sum16);
    const __m256i sum32 = _mm256_madd_epi16(sum16, _mm256_set1_epi16(1));
    _mm_store_si128((__m128i*)block.sum32, _mm256_cvtepi32_epi16(sum32));
}

void quantize_k_512(const Activations& a, int64_t t0, int64_t t1, BlockK* out) {
    for (int64_t t = t0; t < t1; ++t) {
        for (int64_t b = 0; b < a.cols / kKBlock; ++b) {
            BlockK& block = out[b * a.n + t];
            block.scale = quantize_256(a.x + t * a.cols + b * kKBlock, block.q);
            sum_256(block);
        }
    }
}

inline float quantize_32(const float* x, int8_t* q) {
    const uint32_t bits = _mm512_reduce_max_epu32(_mm512_max_epu32(magnitudes(x), magnitudes(x + 16)));
    if (!is_usual(bits)) return quantize_run(x, kQ8Block, q);
    const __m512 inverse = _mm512_set1_ps(127.0f / float_of_bits(bits));
    store_rounded(x, inverse, q);
    store_rounded(x + 16, inverse, q + 16);
    return float_of_bits(bits) / 127.0f;
}

void quantize_8_512(const Activations& a, int64_t t0, int64_t t1, Block8* out) {
    for (int64_t t = t0; t < t1; ++t) {
        for (int64_t b = 0; b < a.cols / kQ8Block; ++b) {
            Block8& block = out[b * a.n + t];
            block.scale = quantize_32(a.x + t * a.cols + b * kQ8Block, block.q);
            const __m256i fours = _mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_set1_epi8(1), load256(block.q));
            const __m128i two = _mm_add_epi32(_mm256_castsi256_si128(fours), _mm256_extracti128_si256(fours, 1));
            const __m128i one = _mm_add_epi32(two, _mm_unpackhi_epi64(two, two));
            block.sum = _mm_cvtsi128_si32(_mm_add_epi32(one, _mm_shuffle_epi32(one, 1)));
        }
    }
}

// ---------------------------------------------------------------- sixteen rows side by side

// Words of `even` and `odd` lanes in turn.
inline __m512i pair_words(__m512i even, __m512i odd) {
    return _mm512_mask_blend_epi16(0xaaaaaaaau, even, _mm512_slli_epi32(odd, 16));
}

void join_k(const float* x, int64_t stride, int64_t n, SixteenK* out) {
    const __m512i ones = _mm512_set1_epi8(1), zero = _mm512_setzero_si512();
    alignas(64) int8_t rows[16][kKBlock];
    for (int t = 0; t < 16; ++t) out->scale[t] = t < n ? quantize_256(x + t * stride, rows[t]) : 0.0f;
    __m512i sums[32], most16 = zero, most32 = zero;
    for (int k = 0; k < 64; k += 16) {
        __m512i v[16], magnitude[4];
        for (int t = 0; t < 16; ++t) v[t] = t < n ? _mm512_load_si512(rows[t] + 4 * k) : zero;
        transpose(v);
        for (int i = 0; i < 4; ++i) {
            magnitude[i] = zero;
            for (int j = 4 * i; j < 4 * i + 4; ++j) {
                magnitude[i] = _mm512_dpbusd_epi32(magnitude[i], _mm512_abs_epi8(v[j]), ones);
            }
            most16 = _mm512_max_epi32(most16, magnitude[i]);
        }
        most32 = _mm512_max_epi32(most32, _mm512_add_epi32(magnitude[0], magnitude[1]));
        most32 = _mm512_max_epi32(most32, _mm512_add_epi32(magnitude[2], magnitude[3]));
        for (int i = 0; i < 16; ++i) _mm512_store_si512(out->q[k + i], v[i]);
        for (int i = 0; i < 8; ++i) {
            sums[k / 2 + i] = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(zero, ones, v[2 * i]), ones, v[2 * i + 1]);
        }
    }
    for (int n_sums = 32; n_sums > 4; n_sums /= 2) {
        int16_t* pairs = n_sums == 32 ? out->sum8[0][0] : n_sums == 16 ? out->sum16[0][0] : out->sum32[0][0];
        for (int i = 0; i < n_sums / 2; ++i) {
            _mm512_store_si512(pairs + 32 * i, pair_words(sums[2 * i], sums[2 * i + 1]));
            sums[i] = _mm512_add_epi32(sums[2 * i], sums[2 * i + 1]);
        }
    }
    out->most16 = _mm512_reduce_max_epi32(most16);
    out->most32 = _mm512_reduce_max_epi32(most32);
}

void join_8(const float* x, int64_t stride, int64_t n, Sixteen8* out) {
    const __m512i ones = _mm512_set1_epi8(1);
    alignas(64) int8_t rows[16][2 * kQ8Block] = {};  // half used: so that a row is a register
    for (int t = 0; t < 16; ++t) out->scale[t] = t < n ? quantize_32(x + t * stride, rows[t]) : 0.0f;
    __m512i v[16], sum = _mm512_setzero_si512();
    for (int t = 0; t < 16; ++t) v[t] = _mm512_load_si512(rows[t]);
    transpose(v);
    for (int k = 0; k < 8; ++k) {
        _mm512_store_si512(out->q[k], v[k]);
        sum = _mm512_dpbusd_epi32(sum, ones, v[k]);
    }
    _mm512_store_si512(out->sum, sum);
}
