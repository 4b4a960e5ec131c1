// Activation rows side by side, quantised as in generic.inl. Included inside an AVX2 variant's namespace, behind
// vectors_avx2.h.

// Words of `even` and `odd` lanes in turn.
inline __m256i pair_words(__m256i even, __m256i odd) {
    return _mm256_blend_epi16(even, _mm256_slli_epi32(odd, 16), 0xaa);
}

// Sums over four bytes of each lane.
inline __m256i add_fours(__m256i bytes) {
    return _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), bytes), _mm256_set1_epi16(1));
}

// Sums of magnitudes of four registers' bytes.
inline __m256i add_magnitudes(const __m256i v[4]) {
    __m256i sum = _mm256_setzero_si256();
    for (int k = 0; k < 4; ++k) sum = _mm256_add_epi32(sum, add_fours(_mm256_abs_epi8(v[k])));
    return sum;
}

inline int32_t largest(__m256i v) {
    alignas(32) int32_t lanes[8];
    _mm256_store_si256((__m256i*)lanes, v);
    for (int i = 1; i < 8; ++i) lanes[0] = lanes[i] > lanes[0] ? lanes[i] : lanes[0];
    return lanes[0];
}

// 32 columns of 8 rows, the rows' columns `stride` bytes apart, to q[0..8][first..first + 8].
inline void lay_side_by_side(const int8_t* rows, int stride, int8_t (*q)[16][4], int first, __m256i v[8]) {
    for (int t = 0; t < 8; ++t) v[t] = load256(rows + t * stride);
    transpose(v);
    for (int k = 0; k < 8; ++k) _mm256_store_si256((__m256i*)q[k][first], v[k]);
}

void join_k(const float* x, int64_t stride, int64_t n, SixteenK* out) {
    alignas(32) int8_t rows[16][kKBlock];
    for (int t = 0; t < 16; ++t) {
        out->scale[t] = t < n ? quantize_run(x + t * stride, kKBlock, rows[t]) : 0.0f;
        if (t >= n) std::memset(rows[t], 0, kKBlock);
    }
    __m256i most16 = _mm256_setzero_si256(), most32 = most16;
    for (int first = 0; first < 16; first += 8) {
        __m256i sums[32];
        for (int k = 0; k < 64; k += 8) {
            __m256i v[8];
            lay_side_by_side(rows[first] + 4 * k, kKBlock, out->q + k, first, v);
            const __m256i a = add_magnitudes(v), b = add_magnitudes(v + 4);
            most16 = _mm256_max_epi32(most16, _mm256_max_epi32(a, b));
            most32 = _mm256_max_epi32(most32, _mm256_add_epi32(a, b));
            for (int i = 0; i < 4; ++i) {
                sums[k / 2 + i] = _mm256_add_epi32(add_fours(v[2 * i]), add_fours(v[2 * i + 1]));
            }
        }
        for (int n_sums = 32; n_sums > 4; n_sums /= 2) {
            auto* pairs = n_sums == 32 ? out->sum8 : n_sums == 16 ? out->sum16 : out->sum32;
            for (int i = 0; i < n_sums / 2; ++i) {
                _mm256_store_si256((__m256i*)pairs[i][first], pair_words(sums[2 * i], sums[2 * i + 1]));
                sums[i] = _mm256_add_epi32(sums[2 * i], sums[2 * i + 1]);
            }
        }
    }
    out->most16 = largest(most16);
    out->most32 = largest(most32);
}

void join_8(const float* x, int64_t stride, int64_t n, Sixteen8* out) {
    alignas(32) int8_t rows[16][kQ8Block] = {};
    for (int t = 0; t < 16; ++t) out->scale[t] = t < n ? quantize_run(x + t * stride, kQ8Block, rows[t]) : 0.0f;
    for (int first = 0; first < 16; first += 8) {
        __m256i v[8], sum = _mm256_setzero_si256();
        lay_side_by_side(rows[first], kQ8Block, out->q, first, v);
        for (int k = 0; k < 8; ++k) sum = _mm256_add_epi32(sum, add_fours(v[k]));
        _mm256_store_si256((__m256i*)(out->sum + first), sum);
    }
}
