// 16 x 16 transposition of 32-bit elements: rows in, columns out.
inline void transpose(__m512i v[16]) {
    __m512i w[16];
    for (int i = 0; i < 16; i += 2) {
        w[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        w[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        for (int j = 0; j < 2; ++j) {
            v[i + 2 * j] = _mm512_unpacklo_epi64(w[i + j], w[i + 2 + j]);
            v[i + 2 * j + 1] = _mm512_unpackhi_epi64(w[i + j], w[i + 2 + j]);
        }
    }
    // Now lane group g of v[4 q + c] holds column 4 g + c of rows 4 q .. 4 q + 3.
    for (int c = 0; c < 4; ++c) {
        const __m512i a = _mm512_shuffle_i32x4(v[c], v[4 + c], 0x44), b = _mm512_shuffle_i32x4(v[c], v[4 + c], 0xee);
        const __m512i d = _mm512_shuffle_i32x4(v[8 + c], v[12 + c], 0x44);
        const __m512i e = _mm512_shuffle_i32x4(v[8 + c], v[12 + c], 0xee);
        w[c] = _mm512_shuffle_i32x4(a, d, 0x88);
        w[4 + c] = _mm512_shuffle_i32x4(a, d, 0xdd);
        w[8 + c] = _mm512_shuffle_i32x4(b, e, 0x88);
        w[12 + c] = _mm512_shuffle_i32x4(b, e, 0xdd);
    }
    for (int i = 0; i < 16; ++i) v[i] = w[i];
}
