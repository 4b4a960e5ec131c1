// `Wide`: four lanes of 16 bytes, one AVX-512 register. rows_small.inl is written against it. Included inside the
// variant's namespace.

struct Wide {
    static constexpr int kLanes = 4;
    __m512i v;

    static Wide zero() { return {_mm512_setzero_si512()}; }
    static Wide set(int byte) { return {_mm512_set1_epi8(char(byte))}; }
    static Wide same(const void* p) { return {_mm512_broadcast_i32x4(load128(p))}; }
    // 16 bytes at p, p + stride, ...
    static Wide lanes(const void* p, int64_t stride) {
        const char* c = (const char*)p;
        __m512i v = _mm512_castsi128_si512(load128(c));
        v = _mm512_inserti32x4(v, load128(c + stride), 1);
        v = _mm512_inserti32x4(v, load128(c + 2 * stride), 2);
        return {_mm512_inserti32x4(v, load128(c + 3 * stride), 3)};
    }
    // An integer at p, p + stride, ..., in all four places of its lane.
    static Wide spread(const int32_t* p, int64_t stride) {
        const auto at = [&](int i) { return _mm_cvtsi32_si128(*(const int32_t*)((const char*)p + i * stride)); };
        __m512i v = _mm512_broadcastd_epi32(at(0));
        v = _mm512_mask_broadcastd_epi32(v, 0x00f0, at(1));
        v = _mm512_mask_broadcastd_epi32(v, 0x0f00, at(2));
        return {_mm512_mask_broadcastd_epi32(v, 0xf000, at(3))};
    }
    Wide low_nibbles() const { return {_mm512_and_si512(v, _mm512_set1_epi8(15))}; }
    Wide high_nibbles() const { return {_mm512_and_si512(_mm512_srli_epi16(v, 4), _mm512_set1_epi8(15))}; }
    Wide shuffle(Wide index) const { return {_mm512_shuffle_epi8(v, index.v)}; }
    // + 16 where (byte & bit) is not 0.
    Wide plus_16_where(Wide bytes, Wide bits) const {
        return {_mm512_mask_add_epi8(v, _mm512_test_epi8_mask(bytes.v, bits.v), v, _mm512_set1_epi8(16))};
    }
};

inline Wide operator^(Wide a, Wide b) { return {_mm512_xor_si512(a.v, b.v)}; }
inline Wide operator-(Wide a, Wide b) { return {_mm512_sub_epi32(a.v, b.v)}; }

// Four floats in each lane, one per weight row.
struct Fours {
    __m512 v;

    static Fours set(float f) { return {_mm512_set1_ps(f)}; }
    static Fours spread(const float* p, int64_t stride) {
        const auto at = [&](int i) { return _mm_load_ss((const float*)((const char*)p + i * stride)); };
        __m512 v = _mm512_broadcastss_ps(at(0));
        v = _mm512_mask_broadcastss_ps(v, 0x00f0, at(1));
        v = _mm512_mask_broadcastss_ps(v, 0x0f00, at(2));
        return {_mm512_mask_broadcastss_ps(v, 0xf000, at(3))};
    }
    static Fours of_ints(Wide w) { return {_mm512_cvtepi32_ps(w.v)}; }
    // From 16 halves: of d the lower, of minima the upper 32 bytes.
    static Fours of_low_halves(Wide w) { return {_mm512_cvtph_ps(_mm512_castsi512_si256(w.v))}; }
    static Fours of_high_halves(Wide w) { return {_mm512_cvtph_ps(_mm512_extracti64x4_epi64(w.v, 1))}; }
    // From e8m0 of twice the unit, in the lower 32 bytes as lower halves of words.
    static Fours of_exponents(Wide w) {
        const __m256i bytes = _mm256_and_si256(_mm512_castsi512_si256(w.v), _mm256_set1_epi16(255));
        const __m512i e = _mm512_cvtepu16_epi32(bytes);
        const __m512i normal = _mm512_slli_epi32(_mm512_sub_epi32(e, _mm512_set1_epi32(1)), 23);
        const __mmask16 is_subnormal = _mm512_cmplt_epi32_mask(e, _mm512_set1_epi32(2));
        return {_mm512_castsi512_ps(_mm512_mask_sllv_epi32(normal, is_subnormal, _mm512_set1_epi32(0x200000), e))};
    }
};
inline Fours operator*(Fours a, Fours b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Fours operator+(Fours a, Fours b) { return {_mm512_add_ps(a.v, b.v)}; }

// Lane by lane: the sum of a's four, of b's, ...
inline Wide add_in_lanes(Wide a, Wide b, Wide c, Wide d) {
    const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a.v, b.v), _mm512_unpackhi_epi32(a.v, b.v));
    const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c.v, d.v), _mm512_unpackhi_epi32(c.v, d.v));
    return {_mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd))};
}

// The words 0 and 1 of blocks of four rows, each block in a lane: words 0 of all lanes, then words 1; rows innermost.
inline Wide first_words(Wide a, Wide b, Wide c, Wide d) {
    const __m512i ab = _mm512_unpacklo_epi16(a.v, b.v), cd = _mm512_unpacklo_epi16(c.v, d.v);
    const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    return {_mm512_permutexvar_epi64(order, _mm512_unpacklo_epi32(ab, cd))};
}

// The same of blocks that lie `stride` bytes apart, where 64 bytes reach the last one's.
template <int stride>
inline Wide first_words(const uint8_t* const blocks[4]) {
    constexpr long long four = 0x0001000100010001;
    const auto at = [](int b) { return four * (b * stride / 2); };
    const __m512i index = _mm512_setr_epi64(at(0), at(1), at(2), at(3), at(0) + four, at(1) + four, at(2) + four,
                                            at(3) + four);
    __m512i words = _mm512_permutexvar_epi16(index, _mm512_loadu_si512(blocks[0]));
    words = _mm512_mask_permutexvar_epi16(words, 0x22222222, index, _mm512_loadu_si512(blocks[1]));
    words = _mm512_mask_permutexvar_epi16(words, 0x44444444, index, _mm512_loadu_si512(blocks[2]));
    words = _mm512_mask_permutexvar_epi16(words, 0x88888888, index, _mm512_loadu_si512(blocks[3]));
    if constexpr (stride % 2 != 0) {  // odd blocks begin with a word's upper byte
        words = _mm512_srlv_epi16(words, _mm512_setr_epi64(0, four * 8, 0, four * 8, 0, 0, 0, 0));
    }
    return {words};
}

// What T activation rows by four weight rows come to: the terms of T vectors are added lane after lane.
template <int T>
struct Totals {
    __m512 v = _mm512_setzero_ps();  // a lane per activation row; where T = 2 these are the first and third

    PRIMA_INLINE void add(const Fours terms[T], int count) {
        const __m512 a = terms[0].v, b = terms[1].v;
        if constexpr (T == 2) {
            add_if(count > 0, _mm512_shuffle_f32x4(a, b, 0x00));
            add_if(count > 1, _mm512_shuffle_f32x4(a, b, 0x55));
            add_if(count > 2, _mm512_shuffle_f32x4(a, b, 0xaa));
            add_if(count > 3, _mm512_shuffle_f32x4(a, b, 0xff));
        } else {
            const __m512 c = terms[2].v, d = terms[T - 1].v;
            const __m512 ab = _mm512_shuffle_f32x4(a, b, 0x44), cd = _mm512_shuffle_f32x4(c, d, 0x44);
            const __m512 ab_next = _mm512_shuffle_f32x4(a, b, 0xee), cd_next = _mm512_shuffle_f32x4(c, d, 0xee);
            add_if(count > 0, _mm512_shuffle_f32x4(ab, cd, 0x88));
            add_if(count > 1, _mm512_shuffle_f32x4(ab, cd, 0xdd));
            add_if(count > 2, _mm512_shuffle_f32x4(ab_next, cd_next, 0x88));
            add_if(count > 3, _mm512_shuffle_f32x4(ab_next, cd_next, 0xdd));
        }
    }
    void store(float* out) const {
        const __m512 in_order = T == 2 ? _mm512_shuffle_f32x4(v, v, 0x08) : v;
        _mm512_mask_storeu_ps(out, __mmask16((1 << 4 * T) - 1), in_order);
    }

private:
    PRIMA_INLINE void add_if(bool counts, __m512 terms) {
        if (counts) v = _mm512_add_ps(v, terms);
    }
};

template <>
struct Totals<1> {
    __m128 v = _mm_setzero_ps();

    PRIMA_INLINE void add(const Fours terms[1], int count) {
        const __m512 a = terms[0].v;
        v = _mm_add_ps(v, _mm512_castps512_ps128(a));
        if (count > 1) v = _mm_add_ps(v, _mm512_extractf32x4_ps(a, 1));
        if (count > 2) v = _mm_add_ps(v, _mm512_extractf32x4_ps(a, 2));
        if (count > 3) v = _mm_add_ps(v, _mm512_extractf32x4_ps(a, 3));
    }
    void store(float* out) const { _mm_storeu_ps(out, v); }
};
