// `Ints` and `Floats` (see vectors_avx512.h): a register of 8 lanes. Included inside the variant's namespace.

struct Ints {
    static constexpr int kLanes = 8;
    __m256i v;

    static Ints zero() { return {_mm256_setzero_si256()}; }
    static Ints set(int32_t value) { return {_mm256_set1_epi32(value)}; }
    static Ints set_words(int value) { return {_mm256_set1_epi16(short(value))}; }
    static Ints load(const void* p) { return {_mm256_load_si256((const __m256i*)p)}; }
    void store(void* p) const { _mm256_store_si256((__m256i*)p, v); }
    Ints low_words() const { return {_mm256_srai_epi32(_mm256_slli_epi32(v, 16), 16)}; }
    Ints high_words() const { return {_mm256_srai_epi32(v, 16)}; }
    // Every other signed byte as a word.
    Ints even_bytes() const { return {_mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8)}; }
    Ints odd_bytes() const { return {_mm256_srai_epi16(v, 8)}; }
};
inline Ints operator+(Ints a, Ints b) { return {_mm256_add_epi32(a.v, b.v)}; }
inline Ints operator-(Ints a, Ints b) { return {_mm256_sub_epi32(a.v, b.v)}; }
inline Ints operator*(Ints a, Ints b) { return {_mm256_mullo_epi32(a.v, b.v)}; }
inline Ints multiply_words(Ints a, Ints b) { return {_mm256_mullo_epi16(a.v, b.v)}; }
inline Ints add_pairs(Ints sum, Ints a, Ints b) { return {add_pairs(sum.v, a.v, b.v)}; }

inline Ints hidden(Ints i) {
#if defined(__GNUC__) || defined(__clang__)
    __asm__ volatile("" : "+x"(i.v));
#endif
    return i;
}

struct Floats {
    __m256 v;

    static Floats set(float value) { return {_mm256_set1_ps(value)}; }
    static Floats of(Ints i) { return {_mm256_cvtepi32_ps(i.v)}; }
    static Floats of_bits(Ints i) { return {_mm256_castsi256_ps(i.v)}; }
    static Floats load(const float* p) { return {_mm256_load_ps(p)}; }
    void store(float* p) const { _mm256_store_ps(p, v); }
};
inline Floats operator+(Floats a, Floats b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Floats operator-(Floats a, Floats b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Floats operator*(Floats a, Floats b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }

// 8 x 8 transposition of 32-bit elements: rows in, columns out.
inline void transpose(__m256i v[8]) {
    __m256i w[8];
    for (int i = 0; i < 8; i += 2) {
        w[i] = _mm256_unpacklo_epi32(v[i], v[i + 1]);
        w[i + 1] = _mm256_unpackhi_epi32(v[i], v[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        for (int j = 0; j < 2; ++j) {
            v[i + 2 * j] = _mm256_unpacklo_epi64(w[i + j], w[i + 2 + j]);
            v[i + 2 * j + 1] = _mm256_unpackhi_epi64(w[i + j], w[i + 2 + j]);
        }
    }
    for (int c = 0; c < 4; ++c) {
        w[c] = _mm256_permute2x128_si256(v[c], v[4 + c], 0x20);
        w[4 + c] = _mm256_permute2x128_si256(v[c], v[4 + c], 0x31);
    }
    for (int i = 0; i < 8; ++i) v[i] = w[i];
}

// Up to 8 of the rows that lie `stride` floats apart, from columns of a register each.
inline void store_turned(const float (*columns)[8], int n_columns, int64_t n_rows, float* out, int64_t stride) {
    __m256i v[8];
    for (int r = 0; r < 8; ++r) v[r] = load256(columns[r]);
    transpose(v);
    const __m256i numbers = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i present = _mm256_cmpgt_epi32(_mm256_set1_epi32(n_columns), numbers);
    for (int t = 0; t < 8 && t < n_rows; ++t) {
        _mm256_maskstore_epi32((int*)(out + t * stride), present, v[t]);
    }
}
