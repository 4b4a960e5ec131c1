// `Lanes` (see lanes_portable.h) as two AVX registers: lanes 0-7 and 8-15. Needs F16C.
// Included inside the variant's namespace.

constexpr int kFloatTile = 2, kFloatWideTile = 2;  // 4 totals of two registers each, 16 in all
constexpr int kScorePositions = 1;
constexpr int kValueVectors = 1;

struct Lanes {
    __m256 lo, hi;

    static Lanes set(float f) { return {_mm256_set1_ps(f), _mm256_set1_ps(f)}; }
    static Lanes load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
    static Lanes load_half(const uint16_t* p) {
        return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)),
                _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
    }
    static __m256 widen_bf16(const uint16_t* p) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
    }
    static Lanes load_bf16(const uint16_t* p) { return {widen_bf16(p), widen_bf16(p + 8)}; }
    static __m256 widen_int8(const int8_t* p) {
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
    }
    static Lanes load_int8(const int8_t* p) { return {widen_int8(p), widen_int8(p + 8)}; }
    static Lanes set_half(uint16_t h) {
        const __m256 all = _mm256_cvtph_ps(_mm_set1_epi16(short(h)));
        return {all, all};
    }
    void store(float* p) const {
        _mm256_storeu_ps(p, lo);
        _mm256_storeu_ps(p + 8, hi);
    }
    void store_half(uint16_t* p) const {
        _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(lo, _MM_FROUND_TO_NEAREST_INT));
        _mm_storeu_si128((__m128i*)(p + 8), _mm256_cvtps_ph(hi, _MM_FROUND_TO_NEAREST_INT));
    }
    __m256 halves() const { return _mm256_add_ps(lo, hi); }
    float sum() const {
        const __m256 s8 = halves();
        const __m128 s4 = _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
        const __m128 s2 = _mm_add_ps(s4, _mm_movehl_ps(s4, s4));
        return _mm_cvtss_f32(_mm_add_ss(s2, _mm_movehdup_ps(s2)));
    }
    // Eight rows' halves added: their eights, fours, twos and ones.
    static __m256 sums_of_eight(const float* p) {
        __m256 fours[4];
        for (int i = 0; i < 4; ++i) {
            const __m256 a = load(p + 16 * i).halves(), b = load(p + 16 * (i + 4)).halves();
            fours[i] = _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
        }
        const auto twos = [&](int i, int j) {
            const __m256d a = _mm256_castps_pd(fours[i]), b = _mm256_castps_pd(fours[j]);
            return _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(a, b)),
                                 _mm256_castpd_ps(_mm256_unpackhi_pd(a, b)));
        };
        const __m256 a = twos(0, 1), b = twos(2, 3);
        return _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x88), _mm256_shuffle_ps(a, b, 0xdd));
    }
    static Lanes sums(const float* p) { return {sums_of_eight(p), sums_of_eight(p + 128)}; }
    static __m256 power_of_two(__m256 v) {
        return _mm256_castsi256_ps(
            _mm256_add_epi32(_mm256_slli_epi32(_mm256_castps_si256(v), 23), _mm256_set1_epi32(0x3f800000)));
    }
    Lanes power_of_two() const { return {power_of_two(lo), power_of_two(hi)}; }
};

inline Lanes operator+(Lanes a, Lanes b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline Lanes operator-(Lanes a, Lanes b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline Lanes operator*(Lanes a, Lanes b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline Lanes operator/(Lanes a, Lanes b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline Lanes max(Lanes a, Lanes b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline Lanes min(Lanes a, Lanes b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
