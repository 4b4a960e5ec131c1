// `Wide` (see wide_avx512.h) as one AVX register: two lanes. Included inside the variant's namespace.

struct Wide {
    static constexpr int kLanes = 2;
    __m256i v;

    static Wide zero() { return {_mm256_setzero_si256()}; }
    static Wide set(int byte) { return {_mm256_set1_epi8(char(byte))}; }
    static Wide same(const void* p) { return {broadcast128(p)}; }
    static Wide lanes(const void* p, int64_t stride) {
        return {_mm256_inserti128_si256(_mm256_castsi128_si256(load128(p)), load128((const char*)p + stride), 1)};
    }
    static Wide spread(const int32_t* p, int64_t stride) {
        const __m128i first = _mm_set1_epi32(*p), second = _mm_set1_epi32(*(const int32_t*)((const char*)p + stride));
        return {_mm256_inserti128_si256(_mm256_castsi128_si256(first), second, 1)};
    }
    Wide low_nibbles() const { return {_mm256_and_si256(v, _mm256_set1_epi8(15))}; }
    Wide high_nibbles() const { return {_mm256_and_si256(_mm256_srli_epi16(v, 4), _mm256_set1_epi8(15))}; }
    Wide shuffle(Wide index) const { return {_mm256_shuffle_epi8(v, index.v)}; }
    Wide plus_16_where(Wide bytes, Wide bits) const {
        const __m256i is_set = _mm256_cmpeq_epi8(_mm256_and_si256(bytes.v, bits.v), bits.v);
        return {_mm256_or_si256(v, _mm256_and_si256(is_set, _mm256_set1_epi8(16)))};
    }
};

inline Wide operator^(Wide a, Wide b) { return {_mm256_xor_si256(a.v, b.v)}; }
inline Wide operator-(Wide a, Wide b) { return {_mm256_sub_epi32(a.v, b.v)}; }

struct Fours {
    __m256 v;

    static Fours set(float f) { return {_mm256_set1_ps(f)}; }
    static Fours spread(const float* p, int64_t stride) {
        const __m128 first = _mm_broadcast_ss(p), second = _mm_broadcast_ss((const float*)((const char*)p + stride));
        return {_mm256_insertf128_ps(_mm256_castps128_ps256(first), second, 1)};
    }
    static Fours of_ints(Wide w) { return {_mm256_cvtepi32_ps(w.v)}; }
    static Fours of_low_halves(Wide w) { return {_mm256_cvtph_ps(_mm256_castsi256_si128(w.v))}; }
    static Fours of_high_halves(Wide w) { return {_mm256_cvtph_ps(_mm256_extracti128_si256(w.v, 1))}; }
    static Fours of_exponents(Wide w) {
        const __m256i e = _mm256_cvtepu16_epi32(_mm_and_si128(_mm256_castsi256_si128(w.v), _mm_set1_epi16(255)));
        const __m256i normal = _mm256_slli_epi32(_mm256_sub_epi32(e, _mm256_set1_epi32(1)), 23);
        const __m256i subnormal = _mm256_sllv_epi32(_mm256_set1_epi32(0x200000), e);
        const __m256i is_subnormal = _mm256_cmpgt_epi32(_mm256_set1_epi32(2), e);
        return {_mm256_castsi256_ps(_mm256_blendv_epi8(normal, subnormal, is_subnormal))};
    }
};
inline Fours operator*(Fours a, Fours b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Fours operator+(Fours a, Fours b) { return {_mm256_add_ps(a.v, b.v)}; }

inline Wide add_in_lanes(Wide a, Wide b, Wide c, Wide d) {
    const __m256i ab = _mm256_add_epi32(_mm256_unpacklo_epi32(a.v, b.v), _mm256_unpackhi_epi32(a.v, b.v));
    const __m256i cd = _mm256_add_epi32(_mm256_unpacklo_epi32(c.v, d.v), _mm256_unpackhi_epi32(c.v, d.v));
    return {_mm256_add_epi32(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd))};
}

inline Wide first_words(Wide a, Wide b, Wide c, Wide d) {
    const __m256i ab = _mm256_unpacklo_epi16(a.v, b.v), cd = _mm256_unpacklo_epi16(c.v, d.v);
    return {_mm256_permute4x64_epi64(_mm256_unpacklo_epi32(ab, cd), 0xd8)};
}

template <int stride>
inline Wide first_words(const uint8_t* const blocks[4]) {
    return first_words(Wide::lanes(blocks[0], stride), Wide::lanes(blocks[1], stride),
                       Wide::lanes(blocks[2], stride), Wide::lanes(blocks[3], stride));
}

template <int T>
struct Totals {
    static constexpr int kPairs = T / 2;
    __m256 pairs[kPairs > 0 ? kPairs : 1];  // of activation rows, a lane each
    __m128 last = _mm_setzero_ps();         // of an odd number

    Totals() {
        for (__m256& pair : pairs) pair = _mm256_setzero_ps();
    }
    PRIMA_INLINE void add(const Fours terms[T], int count) {
        for (int i = 0; i < kPairs; ++i) {
            const __m256 a = terms[2 * i].v, b = terms[2 * i + 1].v;
            pairs[i] = _mm256_add_ps(pairs[i], _mm256_permute2f128_ps(a, b, 0x20));
            if (count > 1) pairs[i] = _mm256_add_ps(pairs[i], _mm256_permute2f128_ps(a, b, 0x31));
        }
        if constexpr (T % 2 != 0) {
            last = _mm_add_ps(last, _mm256_castps256_ps128(terms[T - 1].v));
            if (count > 1) last = _mm_add_ps(last, _mm256_extractf128_ps(terms[T - 1].v, 1));
        }
    }
    void store(float* out) const {
        for (int i = 0; i < kPairs; ++i) _mm256_storeu_ps(out + 8 * i, pairs[i]);
        if constexpr (T % 2 != 0) _mm_storeu_ps(out + 4 * (T - 1), last);
    }
};
