// `Ints` and `Floats`: a register of 16 lanes, for panels (panel_x86.inl). Included inside the variant's namespace,
// behind transpose_avx512.h.

struct Ints {
    static constexpr int kLanes = 16;
    __m512i v;

    static Ints zero() { return {_mm512_setzero_si512()}; }
    static Ints set(int32_t value) { return {_mm512_set1_epi32(value)}; }
    static Ints set_words(int value) { return {_mm512_set1_epi16(short(value))}; }
    static Ints load(const void* p) { return {_mm512_load_si512(p)}; }
    void store(void* p) const { _mm512_store_si512(p, v); }
    Ints low_words() const { return {_mm512_srai_epi32(_mm512_slli_epi32(v, 16), 16)}; }
    Ints high_words() const { return {_mm512_srai_epi32(v, 16)}; }
};
inline Ints operator+(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline Ints operator-(Ints a, Ints b) { return {_mm512_sub_epi32(a.v, b.v)}; }
inline Ints operator*(Ints a, Ints b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
inline Ints multiply_words(Ints a, Ints b) { return {_mm512_mullo_epi16(a.v, b.v)}; }
// Products of words in pairs, added up.
inline Ints add_pairs(Ints sum, Ints a, Ints b) { return {_mm512_dpwssd_epi32(sum.v, a.v, b.v)}; }

// Hides where a value comes from, lest the compiler compute beforehand what is made of it.
inline Ints hidden(Ints i) {
#if defined(__GNUC__) || defined(__clang__)
    __asm__ volatile("" : "+v"(i.v));
#endif
    return i;
}

struct Floats {
    __m512 v;

    static Floats set(float value) { return {_mm512_set1_ps(value)}; }
    static Floats of(Ints i) { return {_mm512_cvtepi32_ps(i.v)}; }
    static Floats of_bits(Ints i) { return {_mm512_castsi512_ps(i.v)}; }
    static Floats load(const float* p) { return {_mm512_load_ps(p)}; }
    void store(float* p) const { _mm512_store_ps(p, v); }
};
inline Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Floats operator-(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }

// Up to 16 of the rows that lie `stride` floats apart, from columns of a register each.
inline void store_turned(const float (*columns)[16], int n_columns, int64_t n_rows, float* out, int64_t stride) {
    __m512i v[16];
    for (int r = 0; r < 16; ++r) v[r] = load512(columns[r]);
    transpose(v);
    const __mmask16 present = __mmask16(n_columns < 16 ? (1u << n_columns) - 1 : 0xffffu);
    for (int t = 0; t < 16 && t < n_rows; ++t) _mm512_mask_storeu_epi32(out + t * stride, present, v[t]);
}
