// `Lanes` (see lanes_portable.h) as one AVX-512 register. Included inside the variant's namespace.

// Products of floats: 4 weight rows by 4 or 6 activation rows; 24 totals, 4 weights and an activation in 32 registers.
constexpr int kFloatTile = 4, kFloatWideTile = 6;
constexpr int kScorePositions = 4;
constexpr int kValueVectors = 4;

struct Lanes {
    __m512 v;

    static Lanes set(float f) { return {_mm512_set1_ps(f)}; }
    static Lanes load(const float* p) { return {_mm512_loadu_ps(p)}; }
    static Lanes load_half(const uint16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
    static Lanes load_bf16(const uint16_t* p) {
        const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
        return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
    }
    static Lanes load_int8(const int8_t* p) {
        return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))};
    }
    static Lanes set_half(uint16_t h) { return {_mm512_cvtph_ps(_mm256_set1_epi16(short(h)))}; }
    void store(float* p) const { _mm512_storeu_ps(p, v); }
    void store_half(uint16_t* p) const {
        _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
    }
    float sum() const {
        const __m256 s8 = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
        const __m128 s4 = _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
        const __m128 s2 = _mm_add_ps(s4, _mm_movehl_ps(s4, s4));
        return _mm_cvtss_f32(_mm_add_ss(s2, _mm_movehdup_ps(s2)));
    }
    // Rows i and i + 4: their eights, side by side.
    static __m512 add_eights(const float* p) {
        const __m512 a = _mm512_castps256_ps512(_mm256_loadu_ps(p)), b = _mm512_castps256_ps512(_mm256_loadu_ps(p + 8));
        return _mm512_add_ps(_mm512_insertf32x8(a, _mm256_loadu_ps(p + 64), 1),
                             _mm512_insertf32x8(b, _mm256_loadu_ps(p + 72), 1));
    }
    // Rows i, i + 4, i + 8 and i + 12: their fours.
    static __m512 add_fours(const float* p) {
        const __m512 a = add_eights(p), b = add_eights(p + 128);
        return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    }
    static __m512 add_twos(const float* p) {
        const __m512d a = _mm512_castps_pd(add_fours(p)), b = _mm512_castps_pd(add_fours(p + 16));
        return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    static Lanes sums(const float* p) {
        const __m512 a = add_twos(p), b = add_twos(p + 32);
        return {_mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd))};
    }
    Lanes power_of_two() const {
        return {_mm512_castsi512_ps(
            _mm512_add_epi32(_mm512_slli_epi32(_mm512_castps_si512(v), 23), _mm512_set1_epi32(0x3f800000)))};
    }
};

inline Lanes operator+(Lanes a, Lanes b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Lanes operator-(Lanes a, Lanes b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Lanes operator*(Lanes a, Lanes b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Lanes operator/(Lanes a, Lanes b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Lanes max(Lanes a, Lanes b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Lanes min(Lanes a, Lanes b) { return {_mm512_min_ps(a.v, b.v)}; }
