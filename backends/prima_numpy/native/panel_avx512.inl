// Products of 16 weight rows with many activation rows. Included inside the AVX-512 variant's namespace.
//
// A panel holds one block of each of 16 rows with the rows in the lanes: codes[k / 4][row][4]. A group of four
// activations is broadcast against 16 rows at once, and all that follows (scales, minima, d) is lane by lane.

constexpr int kPanelFrom = 4;  // fewer activation rows do not pay for unpacking (measured: bench/kernels.py)
constexpr int kTileRows = 64;  // activation rows whose blocks and totals stay in L1 beside a panel

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

// Codes of one row, 64 at a time, to the panel's order: `rows` [16][n_codes] bytes.
inline void interleave(const uint8_t* rows, int n_codes, uint8_t* codes) {
    for (int k = 0; k < n_codes; k += 64) {
        __m512i v[16];
        for (int r = 0; r < 16; ++r) v[r] = load512(rows + r * n_codes + k);
        transpose(v);
        for (int i = 0; i < 16; ++i) _mm512_store_si512(codes + (k / 4 + i) * 64, v[i]);
    }
}

// d's or dmin's of sixteen blocks; `of` is B::d or B::dmin.
template <float (*of)(const uint8_t*)>
inline __m512 sixteen(const uint8_t* const blocks[16]) {
    alignas(64) float values[16];
    for (int r = 0; r < 16; ++r) values[r] = of(blocks[r]);
    return _mm512_load_ps(values);
}

inline __m512i broadcast4(const void* p) { return _mm512_set1_epi32(int32_t(load_u32((const uint8_t*)p))); }

inline void add_term(float* total, float x_scale, __m512 term) {
    _mm512_store_ps(total, _mm512_add_ps(_mm512_load_ps(total), _mm512_mul_ps(_mm512_set1_ps(x_scale), term)));
}

// Codes as unsigned bytes: int8 ones plus 128.
template <class B>
inline __m256i unsigned_codes(const uint8_t* block, int i) {
    if constexpr (B::kIsSigned) {
        return _mm256_xor_si256(B::codes(block, i).v, _mm256_set1_epi8(int8_t(0x80)));
    } else {
        return B::codes(block, i).v;
    }
}
template <class B>
constexpr int kUnsignedOffset = B::kIsSigned ? 128 : B::kOffset;

template <class B>
struct alignas(64) BigPanel {
    using Type = B;
    static constexpr int kQuads = 64 / B::kGroups;  // of a group

    uint8_t codes[64][16][4];
    int32_t scales[B::kGroups][16];
    int16_t scale_pairs[B::kGroups / 2][16][2];
    int16_t minima[B::kGroups / 2][16][2];
    __m512 d, dmin;

    void unpack(const uint8_t* const blocks[16]) {
        alignas(64) uint8_t rows[16][kKBlock];
        for (int r = 0; r < 16; ++r) {
            int16_t row_scales[16], row_minima[16];
            B::scales(blocks[r], row_scales, row_minima);
            for (int j = 0; j < B::kGroups; ++j) {
                scales[j][r] = row_scales[j];
                if constexpr (kUnsignedOffset<B> != 0) scale_pairs[j / 2][r][j % 2] = row_scales[j];
                if constexpr (B::kHasMinima) minima[j / 2][r][j % 2] = row_minima[j];
            }
            PRIMA_UNROLL
            for (int i = 0; i < 8; ++i) {
                _mm256_store_si256((__m256i*)(rows[r] + 32 * i), unsigned_codes<B>(blocks[r], i));
            }
        }
        interleave(rows[0], kKBlock, codes[0][0]);
        d = sixteen<B::d>(blocks);
        if constexpr (B::kHasMinima) dmin = sixteen<B::dmin>(blocks);
    }

    // sums of pairs [groups / 2][16][2] times the activations' sums.
    template <int T>
    static void weigh(const int16_t (*pairs)[16][2], const BlockK* x, __m512i out[T]) {
        for (int t = 0; t < T; ++t) out[t] = _mm512_setzero_si512();
        for (int j = 0; j < B::kGroups / 2; ++j) {
            const __m512i pair = load512(pairs[j]);
            for (int t = 0; t < T; ++t) {
                const int16_t* x_sums = B::kGroups == 8 ? x[t].sum32 : x[t].sum16;
                out[t] = _mm512_dpwssd_epi32(out[t], pair, broadcast4(x_sums + 2 * j));
            }
        }
    }

    template <int T>
    void add_to(const BlockK* x, float (*totals)[16]) const {
        __m512i sums[T];
        for (int t = 0; t < T; ++t) sums[t] = _mm512_setzero_si512();
        for (int j = 0; j < B::kGroups; ++j) {
            __m512i group[T];
            for (int t = 0; t < T; ++t) group[t] = _mm512_setzero_si512();
            for (int k = kQuads * j; k < kQuads * (j + 1); ++k) {
                const __m512i w = load512(codes[k]);
                for (int t = 0; t < T; ++t) group[t] = _mm512_dpbusd_epi32(group[t], w, broadcast4(x[t].q + 4 * k));
            }
            const __m512i s = load512(scales[j]);
            for (int t = 0; t < T; ++t) sums[t] = _mm512_add_epi32(sums[t], _mm512_mullo_epi32(group[t], s));
        }
        __m512i lows[T];
        if constexpr (kUnsignedOffset<B> != 0) {
            weigh<T>(scale_pairs, x, lows);
            const __m512i offset = _mm512_set1_epi32(kUnsignedOffset<B>);
            for (int t = 0; t < T; ++t) sums[t] = _mm512_sub_epi32(sums[t], _mm512_mullo_epi32(lows[t], offset));
        }
        if constexpr (B::kHasMinima) weigh<T>(minima, x, lows);
        for (int t = 0; t < T; ++t) {
            __m512 term = _mm512_mul_ps(d, _mm512_cvtepi32_ps(sums[t]));
            if constexpr (B::kHasMinima) {
                term = _mm512_sub_ps(term, _mm512_mul_ps(dmin, _mm512_cvtepi32_ps(lows[t])));
            }
            add_term(totals[t], x[t].scale, term);
        }
    }
};

template <class B>
struct alignas(64) SmallPanel {
    using Type = B;

    uint8_t codes[8][16][4];
    __m512 d, dmin;

    void unpack(const uint8_t* const blocks[16]) {
        __m512i v[16];
        for (int r = 0; r < 16; ++r) v[r] = _mm512_zextsi256_si512(unsigned_codes<B>(blocks[r], 0));
        transpose(v);
        for (int k = 0; k < 8; ++k) _mm512_store_si512(codes[k], v[k]);
        d = sixteen<B::d>(blocks);
        if constexpr (B::kHasMinima) dmin = sixteen<B::dmin>(blocks);
    }

    template <int T>
    void add_to(const Block8* x, float (*totals)[16]) const {
        __m512i sums[T];
        for (int t = 0; t < T; ++t) sums[t] = _mm512_set1_epi32(-kUnsignedOffset<B> * x[t].sum);
        for (int k = 0; k < 8; ++k) {
            const __m512i w = load512(codes[k]);
            for (int t = 0; t < T; ++t) sums[t] = _mm512_dpbusd_epi32(sums[t], w, broadcast4(x[t].q + 4 * k));
        }
        for (int t = 0; t < T; ++t) {
            __m512 term = _mm512_mul_ps(d, _mm512_cvtepi32_ps(sums[t]));
            if constexpr (B::kHasMinima) {
                term = _mm512_sub_ps(term, _mm512_mul_ps(dmin, _mm512_set1_ps(float(x[t].sum))));
            }
            add_term(totals[t], x[t].scale, term);
        }
    }
};

template <class Panel>
void add_block(const Panel& panel, const typename Panel::Type::X* x, int64_t n, float (*totals)[16]) {
    int64_t t = 0;
    for (; t + 8 <= n; t += 8) panel.template add_to<8>(x + t, totals + t);
    if (n & 4) panel.template add_to<4>(x + t, totals + t), t += 4;
    if (n & 2) panel.template add_to<2>(x + t, totals + t), t += 2;
    if (n & 1) panel.template add_to<1>(x + t, totals + t);
}

template <class B>
void dot_panel(const uint8_t* rows, size_t row_bytes, int n_rows, const Activations& a, float* out,
               int64_t out_stride) {
    const __mmask16 present = __mmask16((1u << n_rows) - 1);
    const int64_t n_blocks = a.cols / B::kWeights;
    for (int64_t t0 = 0; t0 < a.n; t0 += kTileRows) {
        const int64_t n = a.n - t0 < kTileRows ? a.n - t0 : kTileRows;
        alignas(64) float totals[kTileRows][16];
        std::memset(totals, 0, sizeof(totals));
        for (int64_t b = 0; b < n_blocks; ++b) {
            const uint8_t* blocks[16];
            for (int r = 0; r < 16; ++r) {  // missing rows: the last one again
                blocks[r] = rows + size_t(r < n_rows ? r : n_rows - 1) * row_bytes + size_t(b) * B::kBytes;
            }
            std::conditional_t<B::kWeights == kKBlock, BigPanel<B>, SmallPanel<B>> panel;
            panel.unpack(blocks);
            add_block(panel, B::activations(a) + b * a.n + t0, n, totals);
        }
        for (int64_t t = 0; t < n; ++t) {
            _mm512_mask_storeu_ps(out + (t0 + t) * out_stride, present, _mm512_load_ps(totals[t]));
        }
    }
}
