// `Bytes` (see bytes_portable.h) as an AVX register. Needs AVX2 and F16C. Included inside a variant's namespace.

inline __m256i load256(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline __m128i load128(const void* p) { return _mm_loadu_si128((const __m128i*)p); }
inline __m256i broadcast128(const void* p) { return _mm256_broadcastsi128_si256(load128(p)); }

struct Bytes {
    __m256i v;

    static Bytes load(const void* p) { return {load256(p)}; }
    static Bytes set(int value) { return {_mm256_set1_epi8(char(value))}; }
    static Bytes of_words(uint64_t a, uint64_t b, uint64_t c, uint64_t d) {
        return {_mm256_setr_epi64x(int64_t(a), int64_t(b), int64_t(c), int64_t(d))};
    }
    static Bytes nibbles(const uint8_t* p) {
        const __m128i packed = load128(p);
        const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(packed), _mm_srli_epi16(packed, 4), 1);
        return {_mm256_and_si256(both, _mm256_set1_epi8(15))};
    }
    static Bytes of_bits(uint32_t bits) {
        const __m256i byte_of = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
        const __m256i bit_of = _mm256_set1_epi64x(int64_t(0x8040201008040201ull));
        const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(int32_t(bits)), byte_of);
        return {_mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit_of), bit_of)};
    }
    Bytes field(int shift, int mask) const {
        const __m256i moved = shift < 0 ? _mm256_slli_epi16(v, -shift) : _mm256_srli_epi16(v, shift);
        return {_mm256_and_si256(moved, _mm256_set1_epi8(char(mask)))};
    }
    Bytes look_up(const int8_t* table) const {
        return {_mm256_shuffle_epi8(broadcast128(table), v)};
    }
    void store(void* p) const { _mm256_storeu_si256((__m256i*)p, v); }
};

inline Bytes operator|(Bytes a, Bytes b) { return {_mm256_or_si256(a.v, b.v)}; }
inline Bytes operator+(Bytes a, Bytes b) { return {_mm256_add_epi8(a.v, b.v)}; }
inline Bytes negate_where(Bytes minus, Bytes a) {
    return {_mm256_sub_epi8(_mm256_xor_si256(a.v, minus.v), minus.v)};
}

inline float half_at(const uint8_t* p) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(load_u16(p)))); }
