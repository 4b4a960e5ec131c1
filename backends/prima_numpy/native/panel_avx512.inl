// Products of many weight rows with many activation rows. Included inside the AVX-512 variant's namespace.
//
// The lanes are 16 activation rows, put side by side once per call (SixteenK, Sixteen8), so that weights need only be
// taken apart, not transposed: four codes of a row are broadcast against 16 or more activation rows, and scales, minima
// and d are broadcast in the same way. What is loaded serves a tile of weight rows by groups of 16 activation rows,
// wide enough that the multipliers and not the loads are the limit. Totals come out with the activation rows in the
// lanes and are transposed once, at the end.

constexpr int kPanelFrom = 9;      // eight are as fast by fours, without being put side by side (measured)
constexpr int kPanelRows512 = 48;  // weight rows that are taken apart at once: 12 KB of codes, a multiple of any tile
constexpr int kPanelGroups = 32;   // groups of activation rows whose totals, 96 KB, stay in L2 beside their blocks

inline __m512i broadcast4(const void* p) { return _mm512_set1_epi32(int32_t(load_u32((const uint8_t*)p))); }

// ---------------------------------------------------------------- tiles

// Codes as unsigned bytes: int8 ones plus 128.
template <class B>
inline __m256i unsigned_codes(const uint8_t* block, int i) {
    if constexpr (B::kIsSigned) {
        return _mm256_xor_si256(B::codes(block, i).v, _mm256_set1_epi8(int8_t(0x80)));
    } else {
        return B::codes(block, i).v;
    }
}

// totals [groups][kPanelRows512][16]: += x_scale * term.
inline void add_term(float* total, const float* x_scale, __m512 term) {
    _mm512_store_ps(total, _mm512_add_ps(_mm512_load_ps(total), _mm512_mul_ps(_mm512_load_ps(x_scale), term)));
}

// One block of each of up to kPanelRows512 rows.
template <class B>
struct alignas(64) BigPanel {
    using X = SixteenK;
    static constexpr int kBlocks = 1;
    static constexpr int kQuads = 64 / B::kGroups;  // of a group: four codes each

    // Products are summed part by part of a group and then weighed by its scale. A part that fits a word is weighed and
    // added by one instruction, so codes are centred (taken to stand for code - kCentre, where the sums start from
    // -kCentre * (sum of x)) and parts are made short until they fit, down to 8 weights; what still does not fit
    // is multiplied as int32, group by group. Where the weight is not centred itself, the centre is given back.
    static constexpr bool fits(int centre, int quads) {
        const int largest = centre > B::kLargest - centre ? centre : B::kLargest - centre;
        return !B::kIsSigned && largest * 127 * 4 * quads <= 32767;
    }
    static constexpr int find_part(int centre) {
        for (int quads = kQuads; quads >= 2; quads /= 2) {
            if (fits(centre, quads)) return quads;
        }
        return 0;
    }
    static constexpr int kCentre = B::kIsSigned                           ? 128
                                   : B::kOffset != 0 || fits(0, kQuads) ? B::kOffset
                                                                          : (B::kLargest + 1) / 2;
    static constexpr bool kIsWords = find_part(kCentre) != 0;
    static constexpr int kPart = kIsWords ? find_part(kCentre) : kQuads;
    static constexpr int kParts = 64 / kPart;
    static constexpr bool kIsGivenBack = kCentre != (B::kIsSigned ? 128 : B::kOffset);

    uint8_t codes[kPanelRows512][kKBlock];
    int32_t scales[kPanelRows512][B::kGroups];  // low words where kIsWords
    int16_t given_back[kPanelRows512][16];      // kCentre * scale
    int16_t minima[kPanelRows512][16];
    float d[kPanelRows512], dmin[kPanelRows512];

    static const X* activations(const Activations& a) { return a.sixteen_k; }

    void unpack(const uint8_t* block, size_t row_bytes, int n_rows, int) {
        for (int r = 0; r < n_rows; ++r, block += row_bytes) {
            for (int i = 0; i < B::kBytes; i += 64) prefetch(block + B::kBytes + i);
            int16_t row_scales[B::kGroups];
            B::scales(block, row_scales, minima[r]);
            for (int j = 0; j < B::kGroups; j += 8) {
                const __m128i words = load128(row_scales + j);
                const __m256i wide = kIsWords ? _mm256_cvtepu16_epi32(words) : _mm256_cvtepi16_epi32(words);
                _mm256_storeu_si256((__m256i*)(scales[r] + j), wide);
                const __m128i products = _mm_mullo_epi16(words, _mm_set1_epi16(short(kCentre)));
                if constexpr (kIsGivenBack) _mm_storeu_si128((__m128i*)(given_back[r] + j), products);
            }
            PRIMA_UNROLL
            for (int i = 0; i < 8; ++i) {
                _mm256_store_si256((__m256i*)(codes[r] + 32 * i), unsigned_codes<B>(block, i));
            }
            d[r] = B::d(block);
            if constexpr (B::kHasMinima) dmin[r] = B::dmin(block);
        }
    }

    // What the sums of part p start from. Of words only the lower half of a lane counts.
    static __m512i start_of(const X& x, int p) {
        if constexpr (kCentre == 0) return _mm512_setzero_si512();
        const int16_t(*pairs)[16][2] = kPart == 8 ? x.sum32 : kPart == 4 ? x.sum16 : x.sum8;
        const __m512i both = _mm512_load_si512(pairs[p / 2]);
        const __m512i one = p % 2 ? _mm512_srai_epi32(both, 16) : both;
        if constexpr (kIsWords) return _mm512_mullo_epi16(one, _mm512_set1_epi16(short(-kCentre)));
        const __m512i sum = _mm512_srai_epi32(_mm512_slli_epi32(one, 16), 16);
        return _mm512_mullo_epi32(sum, _mm512_set1_epi32(-kCentre));
    }

    template <int W>
    void multiply(const X* x, int64_t, int, int n_rows, float (*totals)[kPanelRows512][16]) const {
        alignas(64) int32_t starts[kParts][W][16];
        for (int p = 0; p < kParts; ++p) {
            for (int w = 0; w < W; ++w) _mm512_store_si512(starts[p][w], start_of(x[w], p));
        }
        constexpr int R = W == 4 ? 4 : 8;
        for (int r = 0; r < n_rows; r += R) multiply_tile<R, W>(x, r, starts, totals);
    }

    template <int R, int W>
    PRIMA_NOINLINE void multiply_tile(const X* x, int r0, const int32_t (*starts)[W][16],
                                      float (*totals)[kPanelRows512][16]) const {
        alignas(64) int32_t sums[R][W][16];
        std::memset(sums, 0, sizeof(sums));
        for (int p = 0; p < kParts; ++p) {
            __m512i part[R][W];
            PRIMA_UNROLL
            for (int w = 0; w < W; ++w) {
                const __m512i start = _mm512_load_si512(starts[p][w]);
                PRIMA_UNROLL
                for (int r = 0; r < R; ++r) part[r][w] = start;
            }
            PRIMA_UNROLL
            for (int k = 0; k < kPart; ++k) {
                __m512i xs[W];
                PRIMA_UNROLL
                for (int w = 0; w < W; ++w) xs[w] = _mm512_load_si512(x[w].q[p * kPart + k]);
                PRIMA_UNROLL
                for (int r = 0; r < R; ++r) {
                    const __m512i four = broadcast4(codes[r0 + r] + 4 * (p * kPart + k));
                    PRIMA_UNROLL
                    for (int w = 0; w < W; ++w) part[r][w] = _mm512_dpbusd_epi32(part[r][w], four, xs[w]);
                }
            }
            PRIMA_UNROLL
            for (int r = 0; r < R; ++r) {
                const __m512i scale = _mm512_set1_epi32(scales[r0 + r][p * kPart / kQuads]);
                PRIMA_UNROLL
                for (int w = 0; w < W; ++w) {
                    __m512i sum = _mm512_load_si512(sums[r][w]);
                    if constexpr (kIsWords) {
                        sum = _mm512_dpwssd_epi32(sum, part[r][w], scale);
                    } else {
                        sum = _mm512_add_epi32(sum, _mm512_mullo_epi32(part[r][w], scale));
                    }
                    _mm512_store_si512(sums[r][w], sum);
                }
            }
        }
        PRIMA_UNROLL
        for (int r = 0; r < R; ++r) finish<W>(x, r0 + r, sums[r], totals);
    }

    // Sums over a block to terms of a row's totals.
    template <int W>
    void finish(const X* x, int r, const int32_t (*sums)[16], float (*totals)[kPanelRows512][16]) const {
        __m512i sum[W], low[W];
        for (int w = 0; w < W; ++w) sum[w] = _mm512_load_si512(sums[w]), low[w] = _mm512_setzero_si512();
        if constexpr (kIsGivenBack || B::kHasMinima) {
            PRIMA_UNROLL
            for (int j = 0; j < B::kGroups / 2; ++j) {
                const __m512i back = broadcast4(given_back[r] + 2 * j), minimum = broadcast4(minima[r] + 2 * j);
                for (int w = 0; w < W; ++w) {
                    const __m512i x_sums = _mm512_load_si512(B::kGroups == 8 ? x[w].sum32[j] : x[w].sum16[j]);
                    if constexpr (kIsGivenBack) sum[w] = _mm512_dpwssd_epi32(sum[w], x_sums, back);
                    if constexpr (B::kHasMinima) low[w] = _mm512_dpwssd_epi32(low[w], x_sums, minimum);
                }
            }
        }
        for (int w = 0; w < W; ++w) {
            __m512 term = _mm512_mul_ps(_mm512_set1_ps(d[r]), _mm512_cvtepi32_ps(sum[w]));
            if constexpr (B::kHasMinima) {
                term = _mm512_sub_ps(term, _mm512_mul_ps(_mm512_set1_ps(dmin[r]), _mm512_cvtepi32_ps(low[w])));
            }
            add_term(totals[w][r], x[w].scale, term);
        }
    }
};

// Up to eight blocks of 32 of each of up to kPanelRows512 rows.
//
// Sums start from the bits of the float 1.5 * 2^23, so that they are floats that are as much too large; d * float(sum)
// is then one instruction, d * float - d * 1.5 * 2^23 with one rounding at its end: the second product is exact, for d
// has few digits, as long as it does not overflow. Other blocks, damaged ones mostly, are multiplied plainly.
template <class B>
struct alignas(64) SmallPanel {
    using X = Sixteen8;
    static constexpr int kBlocks = 8;
    static constexpr int kMagicBits = 0x4b400000;
    static constexpr float kMagic = 12582912.0f;
    static constexpr int kCentre = B::kIsSigned ? 128 : B::kOffset;

    uint8_t codes[kPanelRows512][kBlocks][32];
    float d[kPanelRows512][kBlocks], less[kPanelRows512][kBlocks], dmin[kPanelRows512][kBlocks];
    bool is_plain;

    static const X* activations(const Activations& a) { return a.sixteen_8; }

    void unpack(const uint8_t* rows, size_t row_bytes, int n_rows, int n_blocks) {
        __m256 largest = _mm256_setzero_ps();
        for (int r = 0; r < n_rows; ++r) {
            const uint8_t* block = rows + size_t(r) * row_bytes;
            for (int i = 0; i < kBlocks * B::kBytes; i += 64) prefetch(block + kBlocks * B::kBytes + i);
            for (int b = 0; b < n_blocks; ++b, block += B::kBytes) {
                _mm256_store_si256((__m256i*)codes[r][b], unsigned_codes<B>(block, 0));
                d[r][b] = B::d(block);
                if constexpr (B::kHasMinima) dmin[r][b] = B::dmin(block);
            }
            const __m256 ds = _mm256_load_ps(d[r]);
            _mm256_store_ps(less[r], _mm256_mul_ps(ds, _mm256_set1_ps(-kMagic)));
            // As bits, magnitudes order like the values, NaN above all.
            const __m256i magnitude = _mm256_and_si256(_mm256_castps_si256(ds), _mm256_set1_epi32(0x7fffffff));
            largest = _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(largest), magnitude));
        }
        const __m256 limit = _mm256_set1_ps(1e30f);
        is_plain = _mm256_movemask_ps(_mm256_cmp_ps(largest, limit, _CMP_NLT_UQ)) != 0;
    }

    template <int W>
    void multiply(const X* x, int64_t n_groups, int n_blocks, int n_rows,
                  float (*totals)[kPanelRows512][16]) const {
        for (int b = 0; b < n_blocks; ++b, x += n_groups) {
            if (is_plain) {
                for (int w = 0; w < W; ++w) {
                    for (int r = 0; r < n_rows; ++r) multiply_tile<1, 1, true>(x + w, r, b, totals + w);
                }
            } else {
                constexpr int R = W == 4 ? 6 : 8;
                for (int r = 0; r < n_rows; r += R) multiply_tile<R, W, false>(x, r, b, totals);
            }
        }
    }

    template <int R, int W, bool kIsPlain>
    PRIMA_NOINLINE void multiply_tile(const X* x, int r0, int b, float (*totals)[kPanelRows512][16]) const {
        __m512i sums[R][W];
        PRIMA_UNROLL
        for (int w = 0; w < W; ++w) {
            __m512i start = _mm512_set1_epi32(kMagicBits);
            if constexpr (kCentre != 0) {
                const __m512i x_sum = _mm512_load_si512(x[w].sum);
                start = _mm512_sub_epi32(start, _mm512_mullo_epi32(x_sum, _mm512_set1_epi32(kCentre)));
            }
            PRIMA_UNROLL
            for (int r = 0; r < R; ++r) sums[r][w] = start;
        }
        PRIMA_UNROLL
        for (int k = 0; k < 8; ++k) {
            __m512i xs[W];
            PRIMA_UNROLL
            for (int w = 0; w < W; ++w) xs[w] = _mm512_load_si512(x[w].q[k]);
            PRIMA_UNROLL
            for (int r = 0; r < R; ++r) {
                const __m512i four = broadcast4(codes[r0 + r][b] + 4 * k);
                PRIMA_UNROLL
                for (int w = 0; w < W; ++w) sums[r][w] = _mm512_dpbusd_epi32(sums[r][w], four, xs[w]);
            }
        }
        PRIMA_UNROLL
        for (int r = 0; r < R; ++r) {
            const __m512 ds = _mm512_set1_ps(d[r0 + r][b]), lesses = _mm512_set1_ps(less[r0 + r][b]);
            PRIMA_UNROLL
            for (int w = 0; w < W; ++w) {
                const __m512 shifted = _mm512_castsi512_ps(sums[r][w]);
                __m512 term;
                if constexpr (kIsPlain) {
                    term = _mm512_mul_ps(ds, _mm512_sub_ps(shifted, _mm512_set1_ps(kMagic)));
                } else {
                    term = _mm512_fmadd_ps(ds, shifted, lesses);
                }
                if constexpr (B::kHasMinima) {
                    const __m512 x_sum = _mm512_cvtepi32_ps(_mm512_load_si512(x[w].sum));
                    term = _mm512_sub_ps(term, _mm512_mul_ps(_mm512_set1_ps(dmin[r0 + r][b]), x_sum));
                }
                add_term(totals[w][r0 + r], x[w].scale, term);
            }
        }
    }
};

// ---------------------------------------------------------------- panels

// Totals of 16 activation rows, n of which are there, and n_rows weight rows to out[t][r].
inline void store_totals(const float totals[kPanelRows512][16], int64_t n, int n_rows, float* out, int64_t out_stride) {
    for (int r0 = 0; r0 < n_rows; r0 += 16) {
        __m512i v[16];
        for (int r = 0; r < 16; ++r) v[r] = load512(totals[r0 + r]);
        transpose(v);
        const __mmask16 present = __mmask16(n_rows - r0 < 16 ? (1u << (n_rows - r0)) - 1 : 0xffffu);
        for (int t = 0; t < 16 && t < n; ++t) _mm512_mask_storeu_epi32(out + t * out_stride + r0, present, v[t]);
    }
}

// Some weight rows by the activation rows from g0 * 16 on, at most kPanelGroups * 16.
template <class B>
struct Walk {
    using Panel = std::conditional_t<B::kWeights == kKBlock, BigPanel<B>, SmallPanel<B>>;

    Panel panel;
    alignas(64) float totals[kPanelGroups][kPanelRows512][16];
    const Activations& a;
    int n_rows;
    float* out;
    int64_t out_stride;
    int64_t n_groups;  // of the activations

    // Rows of the panel that are not there are multiplied along with the others: they are zero.
    Walk(const Activations& a, int n_rows, float* out, int64_t out_stride)
        : panel{}, a(a), n_rows(n_rows), out(out), out_stride(out_stride), n_groups(sixteens(a.n)) {}

    // W groups from g0 + g on by the blocks from b on; the last ones give the result.
    template <int W>
    void add_blocks(int64_t b, int n_here, int64_t g0, int64_t g) {
        const bool is_last = b + n_here == a.cols / B::kWeights;
        const int64_t t0 = (g0 + g) * 16, n = a.n - t0 < W * 16 ? a.n - t0 : W * 16;
        prefetch_out(b / Panel::kBlocks, t0, n);
        panel.template multiply<W>(Panel::activations(a) + b * n_groups + g0 + g, n_groups, n_here, n_rows, totals + g);
        if (!is_last) return;
        for (int w = 0; w < W; ++w) {
            store_totals(totals[g + w], n - 16 * w, n_rows, out + (t0 + 16 * w) * out_stride, out_stride);
        }
    }

    // Lines of `out` are far apart and not in the cache: some are fetched beside each block, so that none is awaited.
    void prefetch_out(int64_t unit, int64_t t0, int64_t n) const {
        const int64_t n_units = (a.cols / B::kWeights + Panel::kBlocks - 1) / Panel::kBlocks;
        for (int64_t t = t0 + unit; t < t0 + n; t += n_units) {
            for (int r = 0; r < n_rows; r += 16) prefetch(out + t * out_stride + r);
        }
    }

    void run(const uint8_t* rows, size_t row_bytes, int64_t g0) {
        const int64_t n_blocks = a.cols / B::kWeights;
        const int64_t n = n_groups - g0 < kPanelGroups ? n_groups - g0 : kPanelGroups;
        std::memset(totals, 0, size_t(n) * sizeof(totals[0]));
        for (int64_t b = 0; b < n_blocks; b += Panel::kBlocks) {
            const int n_here = int(n_blocks - b < Panel::kBlocks ? n_blocks - b : Panel::kBlocks);
            panel.unpack(rows + b * B::kBytes, row_bytes, n_rows, n_here);
            int64_t g = 0;
            for (; g + 4 <= n; g += 4) add_blocks<4>(b, n_here, g0, g);
            if (n & 2) add_blocks<2>(b, n_here, g0, g), g += 2;
            if (n & 1) add_blocks<1>(b, n_here, g0, g);
        }
    }
};

template <class B>
void dot_panel(const uint8_t* rows, size_t row_bytes, int n_rows, const Activations& a, float* out,
               int64_t out_stride) {
    Walk<B> walk(a, n_rows, out, out_stride);
    for (int64_t g0 = 0; g0 < walk.n_groups; g0 += kPanelGroups) walk.run(rows, row_bytes, g0);
}
