// Products of 16 weight rows with many activation rows. Included inside the AVX-512 variant's namespace.
//
// A panel holds one block of each of 16 rows with the rows in the lanes: codes[k / 4][row][4]. A group of four
// activations is broadcast against 16 rows at once, and all that follows (scales, minima, d) is lane by lane.

constexpr int kPanelFrom = 4;  // fewer activation rows do not pay for unpacking (measured: bench/kernels.py)
constexpr int kTileRows = 64;  // activation rows whose blocks and totals stay in L1 beside a panel

inline int32_t load_i32(const void* p) {
    int32_t v;
    std::memcpy(&v, p, 4);
    return v;
}

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

inline __m512 load_sixteen_halves(const uint8_t* const blocks[16], int offset) {
    alignas(32) uint16_t halves[16];
    for (int r = 0; r < 16; ++r) halves[r] = load_u16(blocks[r] + offset);
    return _mm512_cvtph_ps(_mm256_load_si256((const __m256i*)halves));
}

struct alignas(64) Q4Panel {
    using Block = BlockK;
    static constexpr int kWeights = kKBlock, kBytes = kQ4KBytes;
    static const Block* activations(const Activations& a) { return a.k; }

    uint8_t codes[64][16][4];
    int32_t scales[8][16];
    int16_t minima[4][16][2];
    __m512 d, dmin;

    void unpack(const uint8_t* const blocks[16]) {
        alignas(64) uint8_t rows[16][kKBlock];
        const __m512i mask = _mm512_set1_epi8(15);
        for (int r = 0; r < 16; ++r) {
            uint64_t s, m;
            unpack_scales(blocks[r] + 4, s, m);
            for (int j = 0; j < 8; ++j) {
                scales[j][r] = int32_t(s >> 8 * j & 255);
                minima[j / 2][r][j % 2] = int16_t(m >> 8 * j & 255);
            }
            for (int h = 0; h < 2; ++h) {
                const __m512i bytes = load512(blocks[r] + 16 + 64 * h);
                const __m512i low = _mm512_and_si512(bytes, mask);
                const __m512i high = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), mask);
                _mm512_store_si512(rows[r] + 128 * h, _mm512_shuffle_i64x2(low, high, 0x44));
                _mm512_store_si512(rows[r] + 128 * h + 64, _mm512_shuffle_i64x2(low, high, 0xee));
            }
        }
        interleave(rows[0], kKBlock, codes[0][0]);
        d = load_sixteen_halves(blocks, 0);
        dmin = load_sixteen_halves(blocks, 2);
    }

    template <int T>
    void add_to(const Block* x, float (*totals)[16]) const {
        __m512i sums[T], lows[T];
        for (int t = 0; t < T; ++t) sums[t] = lows[t] = _mm512_setzero_si512();
        for (int j = 0; j < 8; ++j) {
            __m512i group[T];
            for (int t = 0; t < T; ++t) group[t] = _mm512_setzero_si512();
            for (int k = 8 * j; k < 8 * j + 8; ++k) {
                const __m512i w = load512(codes[k]);
                for (int t = 0; t < T; ++t) {
                    group[t] = _mm512_dpbusd_epi32(group[t], w, _mm512_set1_epi32(load_i32(x[t].q + 4 * k)));
                }
            }
            const __m512i s = load512(scales[j]);
            for (int t = 0; t < T; ++t) sums[t] = _mm512_add_epi32(sums[t], _mm512_mullo_epi32(group[t], s));
        }
        for (int j = 0; j < 4; ++j) {
            const __m512i m = load512(minima[j]);
            for (int t = 0; t < T; ++t) {
                lows[t] = _mm512_dpwssd_epi32(lows[t], m, _mm512_set1_epi32(load_i32(x[t].sum32 + 2 * j)));
            }
        }
        for (int t = 0; t < T; ++t) {
            const __m512 term = _mm512_sub_ps(_mm512_mul_ps(d, _mm512_cvtepi32_ps(sums[t])),
                                              _mm512_mul_ps(dmin, _mm512_cvtepi32_ps(lows[t])));
            const __m512 total = _mm512_load_ps(totals[t]);
            _mm512_store_ps(totals[t], _mm512_add_ps(total, _mm512_mul_ps(_mm512_set1_ps(x[t].scale), term)));
        }
    }
};

struct alignas(64) Q6Panel {
    using Block = BlockK;
    static constexpr int kWeights = kKBlock, kBytes = kQ6KBytes;
    static const Block* activations(const Activations& a) { return a.k; }

    uint8_t codes[64][16][4];
    int32_t scales[16][16];
    int16_t scale_pairs[8][16][2];
    __m512 d;

    void unpack(const uint8_t* const blocks[16]) {
        alignas(64) uint8_t rows[16][kKBlock];
        for (int r = 0; r < 16; ++r) {
            for (int j = 0; j < 16; ++j) {
                const auto scale = int8_t(blocks[r][192 + j]);
                scales[j][r] = scale;
                scale_pairs[j / 2][r][j % 2] = scale;
            }
            for (int h = 0; h < 2; ++h) {
                __m512i first, second;
                unpack_q6(blocks[r], h, first, second);
                _mm512_store_si512(rows[r] + 128 * h, first);
                _mm512_store_si512(rows[r] + 128 * h + 64, second);
            }
        }
        interleave(rows[0], kKBlock, codes[0][0]);
        d = load_sixteen_halves(blocks, 208);
    }

    template <int T>
    void add_to(const Block* x, float (*totals)[16]) const {
        __m512i sums[T], offsets[T];
        for (int t = 0; t < T; ++t) sums[t] = offsets[t] = _mm512_setzero_si512();
        for (int j = 0; j < 16; ++j) {
            __m512i group[T];
            for (int t = 0; t < T; ++t) group[t] = _mm512_setzero_si512();
            for (int k = 4 * j; k < 4 * j + 4; ++k) {
                const __m512i w = load512(codes[k]);
                for (int t = 0; t < T; ++t) {
                    group[t] = _mm512_dpbusd_epi32(group[t], w, _mm512_set1_epi32(load_i32(x[t].q + 4 * k)));
                }
            }
            const __m512i s = load512(scales[j]);
            for (int t = 0; t < T; ++t) sums[t] = _mm512_add_epi32(sums[t], _mm512_mullo_epi32(group[t], s));
        }
        for (int j = 0; j < 8; ++j) {
            const __m512i s = load512(scale_pairs[j]);
            for (int t = 0; t < T; ++t) {
                offsets[t] = _mm512_dpwssd_epi32(offsets[t], s, _mm512_set1_epi32(load_i32(x[t].sum16 + 2 * j)));
            }
        }
        for (int t = 0; t < T; ++t) {
            const __m512i sum = _mm512_sub_epi32(sums[t], _mm512_slli_epi32(offsets[t], 5));
            const __m512 term = _mm512_mul_ps(d, _mm512_cvtepi32_ps(sum));
            const __m512 total = _mm512_load_ps(totals[t]);
            _mm512_store_ps(totals[t], _mm512_add_ps(total, _mm512_mul_ps(_mm512_set1_ps(x[t].scale), term)));
        }
    }
};

struct alignas(64) Q8Panel {
    using Block = Block8;
    static constexpr int kWeights = kQ8Block, kBytes = kQ8Bytes;
    static const Block* activations(const Activations& a) { return a.q8; }

    uint8_t codes[8][16][4];  // w + 128
    __m512 d;

    void unpack(const uint8_t* const blocks[16]) {
        const __m256i sign = _mm256_set1_epi8(int8_t(0x80));
        __m512i v[16];
        for (int r = 0; r < 16; ++r) v[r] = _mm512_zextsi256_si512(_mm256_xor_si256(load256(blocks[r] + 2), sign));
        transpose(v);
        for (int k = 0; k < 8; ++k) _mm512_store_si512(codes[k], v[k]);
        d = load_sixteen_halves(blocks, 0);
    }

    template <int T>
    void add_to(const Block* x, float (*totals)[16]) const {
        __m512i sums[T];
        for (int t = 0; t < T; ++t) sums[t] = _mm512_set1_epi32(-128 * x[t].sum);
        for (int k = 0; k < 8; ++k) {
            const __m512i w = load512(codes[k]);
            for (int t = 0; t < T; ++t) {
                sums[t] = _mm512_dpbusd_epi32(sums[t], w, _mm512_set1_epi32(load_i32(x[t].q + 4 * k)));
            }
        }
        for (int t = 0; t < T; ++t) {
            const __m512 term = _mm512_mul_ps(d, _mm512_cvtepi32_ps(sums[t]));
            const __m512 total = _mm512_load_ps(totals[t]);
            _mm512_store_ps(totals[t], _mm512_add_ps(total, _mm512_mul_ps(_mm512_set1_ps(x[t].scale), term)));
        }
    }
};

template <class Panel>
void add_block(const Panel& panel, const typename Panel::Block* x, int64_t n, float (*totals)[16]) {
    int64_t t = 0;
    for (; t + 8 <= n; t += 8) panel.template add_to<8>(x + t, totals + t);
    if (n & 4) panel.template add_to<4>(x + t, totals + t), t += 4;
    if (n & 2) panel.template add_to<2>(x + t, totals + t), t += 2;
    if (n & 1) panel.template add_to<1>(x + t, totals + t);
}

template <class Panel>
void dot_panel(const uint8_t* rows, size_t row_bytes, int n_rows, const Activations& a, float* out,
               int64_t out_stride) {
    const __mmask16 present = __mmask16((1u << n_rows) - 1);
    const int64_t n_blocks = a.cols / Panel::kWeights;
    for (int64_t t0 = 0; t0 < a.n; t0 += kTileRows) {
        const int64_t n = a.n - t0 < kTileRows ? a.n - t0 : kTileRows;
        alignas(64) float totals[kTileRows][16];
        std::memset(totals, 0, sizeof(totals));
        for (int64_t b = 0; b < n_blocks; ++b) {
            const uint8_t* blocks[16];
            for (int r = 0; r < 16; ++r) {  // missing rows: the last one again
                blocks[r] = rows + size_t(r < n_rows ? r : n_rows - 1) * row_bytes + size_t(b) * Panel::kBytes;
            }
            Panel panel;
            panel.unpack(blocks);
            add_block(panel, Panel::activations(a) + b * a.n + t0, n, totals);
        }
        for (int64_t t = 0; t < n; ++t) {
            _mm512_mask_storeu_ps(out + (t0 + t) * out_stride, present, _mm512_load_ps(totals[t]));
        }
    }
}
