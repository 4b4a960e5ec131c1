// Products of 8 weight rows with many activation rows. Included inside the AVX2 variant's namespace.
//
// As in panel_avx512.inl: a panel holds one block of each of 8 rows with the rows in the lanes, codes[k / 4][row][4].
// Products of bytes come as words, which are added up as long as they fit before they are widened.

constexpr int kPanelFrom = 9;  // fewer activation rows do not pay for unpacking (measured: bench/kernels.py)
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

// d's or dmin's of eight blocks; `of` is B::d or B::dmin.
template <float (*of)(const uint8_t*)>
inline __m256 eight(const uint8_t* const blocks[8]) {
    alignas(32) float values[8];
    for (int r = 0; r < 8; ++r) values[r] = of(blocks[r]);
    return _mm256_load_ps(values);
}

inline void add_term(float* total, float x_scale, __m256 term) {
    _mm256_store_ps(total, _mm256_add_ps(_mm256_load_ps(total), _mm256_mul_ps(_mm256_set1_ps(x_scale), term)));
}

// How many products of pairs can be added up as words, of the `most` that come in a row.
template <class B>
constexpr int words_in_a_row(int most) {
    if (B::kIsSigned) return 1;
    while (most * 2 * B::kLargest * 127 > 32767) most /= 2;
    return most;
}

// Sums of `n` quads of codes by four activations each, as words.
template <class B, int n, int T, class X>
inline void add_words(const uint8_t* codes, const X* x, int k, __m256i words[T]) {
    for (int t = 0; t < T; ++t) words[t] = _mm256_setzero_si256();
    for (int i = 0; i < n; ++i) {
        const __m256i w = _mm256_load_si256((const __m256i*)(codes + 32 * (k + i)));
        for (int t = 0; t < T; ++t) {
            words[t] = _mm256_add_epi16(words[t], multiply<B>(w, broadcast4(x[t].q + 4 * (k + i))));
        }
    }
}

template <class B>
struct alignas(32) BigPanel {
    using Type = B;
    static constexpr int kQuads = 64 / B::kGroups;  // of a group
    static constexpr int kRun = words_in_a_row<B>(kQuads);

    alignas(32) uint8_t codes[64][8][4];
    int16_t scales[B::kGroups][8][2];  // each twice, for the two words of a lane
    int16_t scale_pairs[B::kGroups / 2][8][2];
    int16_t minima[B::kGroups / 2][8][2];
    __m256 d, dmin;

    void unpack(const uint8_t* const blocks[8]) {
        alignas(32) uint8_t rows[8][kKBlock];
        for (int r = 0; r < 8; ++r) {
            int16_t row_scales[16], row_minima[16];
            B::scales(blocks[r], row_scales, row_minima);
            for (int j = 0; j < B::kGroups; ++j) {
                scales[j][r][0] = scales[j][r][1] = row_scales[j];
                if constexpr (B::kOffset != 0) scale_pairs[j / 2][r][j % 2] = row_scales[j];
                if constexpr (B::kHasMinima) minima[j / 2][r][j % 2] = row_minima[j];
            }
            PRIMA_UNROLL
            for (int i = 0; i < 8; ++i) B::codes(blocks[r], i).store(rows[r] + 32 * i);
        }
        interleave(rows, codes[0][0]);
        d = eight<B::d>(blocks);
        if constexpr (B::kHasMinima) dmin = eight<B::dmin>(blocks);
    }

    // sums of pairs [groups / 2][8][2] times the activations' sums.
    static __m256i weigh(const int16_t (*pairs)[8][2], const BlockK& x) {
        const int16_t* x_sums = B::kGroups == 8 ? x.sum32 : x.sum16;
        __m256i sum = _mm256_setzero_si256();
        for (int j = 0; j < B::kGroups / 2; ++j) {
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(load256(pairs[j]), broadcast_pair(x_sums + 2 * j)));
        }
        return sum;
    }

    template <int T>
    void add_to(const BlockK* x, float (*totals)[8]) const {
        __m256i sums[T];
        for (int t = 0; t < T; ++t) sums[t] = _mm256_setzero_si256();
        for (int k = 0; k < 64; k += kRun) {
            __m256i words[T];
            add_words<B, kRun, T>(codes[0][0], x, k, words);
            const __m256i s = load256(scales[k / kQuads]);
            for (int t = 0; t < T; ++t) sums[t] = _mm256_add_epi32(sums[t], _mm256_madd_epi16(words[t], s));
        }
        for (int t = 0; t < T; ++t) {
            if constexpr (B::kOffset != 0) {
                const __m256i offset = _mm256_mullo_epi32(weigh(scale_pairs, x[t]), _mm256_set1_epi32(B::kOffset));
                sums[t] = _mm256_sub_epi32(sums[t], offset);
            }
            __m256 term = _mm256_mul_ps(d, _mm256_cvtepi32_ps(sums[t]));
            if constexpr (B::kHasMinima) {
                term = _mm256_sub_ps(term, _mm256_mul_ps(dmin, _mm256_cvtepi32_ps(weigh(minima, x[t]))));
            }
            add_term(totals[t], x[t].scale, term);
        }
    }
};

template <class B>
struct alignas(32) SmallPanel {
    using Type = B;
    static constexpr int kRun = words_in_a_row<B>(8);

    alignas(32) uint8_t codes[8][8][4];
    __m256 d, dmin;

    void unpack(const uint8_t* const blocks[8]) {
        __m256i v[8];
        for (int r = 0; r < 8; ++r) v[r] = B::codes(blocks[r], 0).v;
        transpose(v);
        for (int k = 0; k < 8; ++k) _mm256_store_si256((__m256i*)codes[k], v[k]);
        d = eight<B::d>(blocks);
        if constexpr (B::kHasMinima) dmin = eight<B::dmin>(blocks);
    }

    template <int T>
    void add_to(const Block8* x, float (*totals)[8]) const {
        __m256i sums[T];
        for (int t = 0; t < T; ++t) sums[t] = _mm256_set1_epi32(-B::kOffset * x[t].sum);
        for (int k = 0; k < 8; k += kRun) {
            __m256i words[T];
            add_words<B, kRun, T>(codes[0][0], x, k, words);
            const __m256i ones = _mm256_set1_epi16(1);
            for (int t = 0; t < T; ++t) sums[t] = _mm256_add_epi32(sums[t], _mm256_madd_epi16(words[t], ones));
        }
        for (int t = 0; t < T; ++t) {
            __m256 term = _mm256_mul_ps(d, _mm256_cvtepi32_ps(sums[t]));
            if constexpr (B::kHasMinima) {
                term = _mm256_sub_ps(term, _mm256_mul_ps(dmin, _mm256_set1_ps(float(x[t].sum))));
            }
            add_term(totals[t], x[t].scale, term);
        }
    }
};

template <class Panel>
void add_block(const Panel& panel, const typename Panel::Type::X* x, int64_t n, float (*totals)[8]) {
    int64_t t = 0;
    for (; t + 4 <= n; t += 4) panel.template add_to<4>(x + t, totals + t);
    for (; t < n; ++t) panel.template add_to<1>(x + t, totals + t);
}

template <class B>
void dot_eight(const uint8_t* rows, size_t row_bytes, int n_rows, const Activations& a, float* out,
               int64_t out_stride) {
    const int64_t n_blocks = a.cols / B::kWeights;
    for (int64_t t0 = 0; t0 < a.n; t0 += kTileRows) {
        const int64_t n = a.n - t0 < kTileRows ? a.n - t0 : kTileRows;
        alignas(32) float totals[kTileRows][8];
        std::memset(totals, 0, sizeof(totals));
        for (int64_t b = 0; b < n_blocks; ++b) {
            const uint8_t* blocks[8];
            for (int r = 0; r < 8; ++r) {  // missing rows: the last one again
                blocks[r] = rows + size_t(r < n_rows ? r : n_rows - 1) * row_bytes + size_t(b) * B::kBytes;
            }
            std::conditional_t<B::kWeights == kKBlock, BigPanel<B>, SmallPanel<B>> panel;
            panel.unpack(blocks);
            add_block(panel, B::activations(a) + b * a.n + t0, n, totals);
        }
        for (int64_t t = 0; t < n; ++t) std::memcpy(out + (t0 + t) * out_stride, totals[t], size_t(n_rows) * 4);
    }
}

template <class B>
void dot_panel(const uint8_t* rows, size_t row_bytes, int n_rows, const Activations& a, float* out,
               int64_t out_stride) {
    for (int r = 0; r < n_rows; r += 8) {
        dot_eight<B>(rows + size_t(r) * row_bytes, row_bytes, n_rows - r < 8 ? n_rows - r : 8, a, out + r,
                         out_stride);
    }
}
