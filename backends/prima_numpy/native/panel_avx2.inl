// Products of 8 weight rows with many activation rows. Included inside the AVX2 variant's namespace.
//
// As in panel_avx512.inl: a panel holds one block of each of 8 rows with the rows in the lanes, codes[k / 4][row][4].
// Products of bytes come as words, which are added up as long as they fit before they are widened.

constexpr int kPanelFrom = 6;  // fewer activation rows do not pay for unpacking (measured: bench/kernels.py)
constexpr int kTileRows = 64;  // activation rows whose blocks and totals stay in L1 beside a panel

inline __m256i broadcast4(const int8_t* q) {
    int32_t four;
    std::memcpy(&four, q, 4);
    return _mm256_set1_epi32(four);
}
inline __m256i broadcast_pair(const int16_t* pair) {
    int32_t two;
    std::memcpy(&two, pair, 4);
    return _mm256_set1_epi32(two);
}

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

// Codes of eight rows, [8][256] bytes, to the panel's order.
inline void interleave(const uint8_t rows[8][kKBlock], uint8_t* codes) {
    for (int k = 0; k < kKBlock; k += 32) {
        __m256i v[8];
        for (int r = 0; r < 8; ++r) v[r] = load256(rows[r] + k);
        transpose(v);
        for (int i = 0; i < 8; ++i) _mm256_store_si256((__m256i*)(codes + (k / 4 + i) * 32), v[i]);
    }
}

inline __m256 load_eight_halves(const uint8_t* const blocks[8], int offset) {
    alignas(16) uint16_t halves[8];
    for (int r = 0; r < 8; ++r) halves[r] = load_u16(blocks[r] + offset);
    return _mm256_cvtph_ps(_mm_load_si128((const __m128i*)halves));
}

inline void add_term(float* total, float x_scale, __m256 term) {
    _mm256_store_ps(total, _mm256_add_ps(_mm256_load_ps(total), _mm256_mul_ps(_mm256_set1_ps(x_scale), term)));
}

struct alignas(32) Q4Panel {
    using Block = BlockK;
    static constexpr int kWeights = kKBlock, kBytes = kQ4KBytes;
    static const Block* activations(const Activations& a) { return a.k; }

    uint8_t codes[64][8][4];
    int16_t scales[8][8][2];  // each twice, for the two words of a lane
    int16_t minima[4][8][2];
    __m256 d, dmin;

    void unpack(const uint8_t* const blocks[8]) {
        alignas(32) uint8_t rows[8][kKBlock];
        const __m256i mask = _mm256_set1_epi8(15);
        for (int r = 0; r < 8; ++r) {
            uint64_t s, m;
            unpack_scales(blocks[r] + 4, s, m);
            for (int j = 0; j < 8; ++j) {
                scales[j][r][0] = scales[j][r][1] = int16_t(s >> 8 * j & 255);
                minima[j / 2][r][j % 2] = int16_t(m >> 8 * j & 255);
            }
            for (int c = 0; c < 4; ++c) {
                const __m256i bytes = load256(blocks[r] + 16 + 32 * c);
                _mm256_store_si256((__m256i*)(rows[r] + 64 * c), _mm256_and_si256(bytes, mask));
                _mm256_store_si256((__m256i*)(rows[r] + 64 * c + 32),
                                   _mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask));
            }
        }
        interleave(rows, codes[0][0]);
        d = load_eight_halves(blocks, 0);
        dmin = load_eight_halves(blocks, 2);
    }

    template <int T>
    void add_to(const Block* x, float (*totals)[8]) const {
        __m256i sums[T];
        for (int t = 0; t < T; ++t) sums[t] = _mm256_setzero_si256();
        for (int j = 0; j < 8; ++j) {
            __m256i words[T];  // 8 times 2 * 15 * 127 fits a word
            for (int t = 0; t < T; ++t) words[t] = _mm256_setzero_si256();
            for (int k = 8 * j; k < 8 * j + 8; ++k) {
                const __m256i w = load256(codes[k]);
                for (int t = 0; t < T; ++t) {
                    words[t] = _mm256_add_epi16(words[t], _mm256_maddubs_epi16(w, broadcast4(x[t].q + 4 * k)));
                }
            }
            const __m256i s = load256(scales[j]);
            for (int t = 0; t < T; ++t) sums[t] = _mm256_add_epi32(sums[t], _mm256_madd_epi16(words[t], s));
        }
        for (int t = 0; t < T; ++t) {
            __m256i low = _mm256_setzero_si256();
            for (int j = 0; j < 4; ++j) {
                low = _mm256_add_epi32(low, _mm256_madd_epi16(load256(minima[j]), broadcast_pair(x[t].sum32 + 2 * j)));
            }
            add_term(totals[t], x[t].scale,
                     _mm256_sub_ps(_mm256_mul_ps(d, _mm256_cvtepi32_ps(sums[t])),
                                   _mm256_mul_ps(dmin, _mm256_cvtepi32_ps(low))));
        }
    }
};

struct alignas(32) Q6Panel {
    using Block = BlockK;
    static constexpr int kWeights = kKBlock, kBytes = kQ6KBytes;
    static const Block* activations(const Activations& a) { return a.k; }

    uint8_t codes[64][8][4];
    int16_t scales[16][8][2];  // each twice
    int16_t scale_pairs[8][8][2];
    __m256 d;

    void unpack(const uint8_t* const blocks[8]) {
        alignas(32) uint8_t rows[8][kKBlock];
        for (int r = 0; r < 8; ++r) {
            for (int j = 0; j < 16; ++j) {
                const auto scale = int8_t(blocks[r][192 + j]);
                scales[j][r][0] = scales[j][r][1] = scale;
                scale_pairs[j / 2][r][j % 2] = scale;
            }
            for (int h = 0; h < 2; ++h) {
                __m256i four[4];
                unpack_q6(blocks[r], h, four);
                for (int i = 0; i < 4; ++i) _mm256_store_si256((__m256i*)(rows[r] + 128 * h + 32 * i), four[i]);
            }
        }
        interleave(rows, codes[0][0]);
        d = load_eight_halves(blocks, 208);
    }

    template <int T>
    void add_to(const Block* x, float (*totals)[8]) const {
        __m256i sums[T];
        for (int t = 0; t < T; ++t) sums[t] = _mm256_setzero_si256();
        for (int k = 0; k < 64; k += 2) {
            const __m256i first = load256(codes[k]), second = load256(codes[k + 1]), s = load256(scales[k / 4]);
            for (int t = 0; t < T; ++t) {  // 2 times 2 * 63 * 127 fits a word
                const __m256i words = _mm256_add_epi16(_mm256_maddubs_epi16(first, broadcast4(x[t].q + 4 * k)),
                                                       _mm256_maddubs_epi16(second, broadcast4(x[t].q + 4 * k + 4)));
                sums[t] = _mm256_add_epi32(sums[t], _mm256_madd_epi16(words, s));
            }
        }
        for (int t = 0; t < T; ++t) {
            __m256i offset = _mm256_setzero_si256();
            for (int j = 0; j < 8; ++j) {
                const __m256i pairs = broadcast_pair(x[t].sum16 + 2 * j);
                offset = _mm256_add_epi32(offset, _mm256_madd_epi16(load256(scale_pairs[j]), pairs));
            }
            const __m256i sum = _mm256_sub_epi32(sums[t], _mm256_slli_epi32(offset, 5));
            add_term(totals[t], x[t].scale, _mm256_mul_ps(d, _mm256_cvtepi32_ps(sum)));
        }
    }
};

struct alignas(32) Q8Panel {
    using Block = Block8;
    static constexpr int kWeights = kQ8Block, kBytes = kQ8Bytes;
    static const Block* activations(const Activations& a) { return a.q8; }

    __m256i codes[8];
    __m256 d;

    void unpack(const uint8_t* const blocks[8]) {
        for (int r = 0; r < 8; ++r) codes[r] = load256(blocks[r] + 2);
        transpose(codes);
        d = load_eight_halves(blocks, 0);
    }

    template <int T>
    void add_to(const Block* x, float (*totals)[8]) const {
        __m256i sums[T];
        for (int t = 0; t < T; ++t) sums[t] = _mm256_setzero_si256();
        for (int k = 0; k < 8; ++k) {
            for (int t = 0; t < T; ++t) {
                sums[t] = _mm256_add_epi32(sums[t], dot_signed(codes[k], broadcast4(x[t].q + 4 * k)));
            }
        }
        for (int t = 0; t < T; ++t) {
            add_term(totals[t], x[t].scale, _mm256_mul_ps(d, _mm256_cvtepi32_ps(sums[t])));
        }
    }
};

template <class Panel>
void add_block(const Panel& panel, const typename Panel::Block* x, int64_t n, float (*totals)[8]) {
    int64_t t = 0;
    for (; t + 4 <= n; t += 4) panel.template add_to<4>(x + t, totals + t);
    for (; t < n; ++t) panel.template add_to<1>(x + t, totals + t);
}

template <class Panel>
void dot_eight(const uint8_t* rows, size_t row_bytes, int n_rows, const Activations& a, float* out,
               int64_t out_stride) {
    const int64_t n_blocks = a.cols / Panel::kWeights;
    for (int64_t t0 = 0; t0 < a.n; t0 += kTileRows) {
        const int64_t n = a.n - t0 < kTileRows ? a.n - t0 : kTileRows;
        alignas(32) float totals[kTileRows][8];
        std::memset(totals, 0, sizeof(totals));
        for (int64_t b = 0; b < n_blocks; ++b) {
            const uint8_t* blocks[8];
            for (int r = 0; r < 8; ++r) {  // missing rows: the last one again
                blocks[r] = rows + size_t(r < n_rows ? r : n_rows - 1) * row_bytes + size_t(b) * Panel::kBytes;
            }
            Panel panel;
            panel.unpack(blocks);
            add_block(panel, Panel::activations(a) + b * a.n + t0, n, totals);
        }
        for (int64_t t = 0; t < n; ++t) std::memcpy(out + (t0 + t) * out_stride, totals[t], size_t(n_rows) * 4);
    }
}

template <class Panel>
void dot_panel(const uint8_t* rows, size_t row_bytes, int n_rows, const Activations& a, float* out,
               int64_t out_stride) {
    for (int r = 0; r < n_rows; r += 8) {
        dot_eight<Panel>(rows + size_t(r) * row_bytes, row_bytes, n_rows - r < 8 ? n_rows - r : 8, a, out + r,
                         out_stride);
    }
}
