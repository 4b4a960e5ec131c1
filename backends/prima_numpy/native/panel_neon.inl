// Products of 8 weight rows with many activation rows. Included inside a NEON variant's namespace, after rows_neon.inl.
//
// A panel holds one block of each of 8 rows as int8 without their offset, in steps of 16 columns. How a step lies and
// is multiplied is the variant's `Tile`: it gives sums [kVectors][activation rows / kTokens], each of four numbers, and
// `spread` says which weight rows' scales belong to the numbers of a vector. kTokens is 2 where a vector has two
// activation rows.

constexpr int kPanelFrom = 4;  // fewer activation rows do not pay for unpacking, by a count of instructions
constexpr int kTileRows = 64;  // activation rows whose blocks and totals stay in L1 beside a panel
constexpr int kStepBytes = 8 * 16;

// Codes 16 at a time, of eight rows, as int8 that stand for themselves.
template <class B>
inline void unpack_steps(const uint8_t* const blocks[8], int i, int8_t* steps) {
    int8x16_t low[8], high[8];
    for (int r = 0; r < 8; ++r) {
        const Bytes codes = codes_of<B>(blocks[r], i);
        low[r] = vsubq_s8(vreinterpretq_s8_u8(codes.lo), vdupq_n_s8(int8_t(B::kOffset)));
        high[r] = vsubq_s8(vreinterpretq_s8_u8(codes.hi), vdupq_n_s8(int8_t(B::kOffset)));
    }
    Tile::arrange(low, steps);
    Tile::arrange(high, steps + kStepBytes);
}

// d's or dmin's; `of` is B::d or B::dmin.
template <float (*of)(const uint8_t*)>
inline void eight(const uint8_t* const blocks[8], float values[8]) {
    for (int r = 0; r < 8; ++r) values[r] = of(blocks[r]);
}

// 8 x 8: rows in, columns out.
inline void transpose_words(int16x8_t v[8]) {
    int32x4_t w[8];
    for (int i = 0; i < 8; i += 2) {
        w[i] = vreinterpretq_s32_s16(vtrn1q_s16(v[i], v[i + 1]));
        w[i + 1] = vreinterpretq_s32_s16(vtrn2q_s16(v[i], v[i + 1]));
    }
    for (int i = 0; i < 2; ++i) {
        for (int half = 0; half < 2; ++half) {  // columns from 4 * half on, of which i and i + 2
            const auto columns = [&](int32x4_t upper, int32x4_t lower) {
                const int64x2_t a = vreinterpretq_s64_s32(upper), b = vreinterpretq_s64_s32(lower);
                return vreinterpretq_s16_s64(half == 0 ? vtrn1q_s64(a, b) : vtrn2q_s64(a, b));
            };
            v[4 * half + i] = columns(vtrn1q_s32(w[i], w[i + 2]), vtrn1q_s32(w[i + 4], w[i + 6]));
            v[4 * half + i + 2] = columns(vtrn2q_s32(w[i], w[i + 2]), vtrn2q_s32(w[i + 4], w[i + 6]));
        }
    }
}

inline void add_term(float* total, float x_scale, float32x4_t term) {
    vst1q_f32(total, vaddq_f32(vld1q_f32(total), vmulq_f32(vdupq_n_f32(x_scale), term)));
}

template <class B>
struct BigPanel {
    using Type = B;
    static constexpr int kSteps = 16 / B::kGroups;  // of a group

    alignas(64) int8_t codes[16 * kStepBytes];
    int32_t scales[B::kGroups][Tile::kVectors][4];
    int16_t minima[B::kGroups][8];
    float d[8], dmin[8];

    void unpack(const uint8_t* const blocks[8]) {
        int16x8_t row_scales[B::kGroups / 8][8], row_minima[B::kGroups / 8][8];
        for (int r = 0; r < 8; ++r) {
            const GroupWords<B> groups(blocks[r]);
            for (int i = 0; i < B::kGroups / 8; ++i) {
                row_scales[i][r] = groups.scales[i];
                if constexpr (B::kHasMinima) row_minima[i][r] = groups.minima[i];
            }
        }
        for (int i = 0; i < B::kGroups / 8; ++i) {
            transpose_words(row_scales[i]);
            for (int j = 0; j < 8; ++j) {
                for (int v = 0; v < Tile::kVectors; ++v) {
                    vst1q_s32(scales[8 * i + j][v], Tile::spread(row_scales[i][j], v));
                }
            }
            if constexpr (B::kHasMinima) {
                transpose_words(row_minima[i]);
                for (int j = 0; j < 8; ++j) vst1q_s16(minima[8 * i + j], row_minima[i][j]);
            }
        }
        PRIMA_UNROLL
        for (int i = 0; i < 8; ++i) unpack_steps<B>(blocks, i, codes + 2 * i * kStepBytes);
        eight<B::d>(blocks, d);
        if constexpr (B::kHasMinima) eight<B::dmin>(blocks, dmin);
    }

    // Minima of rows 4 v .. 4 v + 3 times the sums of their groups' activations.
    int32x4_t weigh_minima(int v, const BlockK& x) const {
        const int16_t* x_sums = B::kGroups == 8 ? x.sum32 : x.sum16;
        int32x4_t sum = vdupq_n_s32(0);
        for (int i = 0; i < B::kGroups; i += 8) {
            const int16x8_t sums = vld1q_s16(x_sums + i);
            const auto of = [&](int j) { return vld1_s16(minima[i + j] + 4 * v); };
            sum = vmlal_laneq_s16(sum, of(0), sums, 0);
            sum = vmlal_laneq_s16(sum, of(1), sums, 1);
            sum = vmlal_laneq_s16(sum, of(2), sums, 2);
            sum = vmlal_laneq_s16(sum, of(3), sums, 3);
            sum = vmlal_laneq_s16(sum, of(4), sums, 4);
            sum = vmlal_laneq_s16(sum, of(5), sums, 5);
            sum = vmlal_laneq_s16(sum, of(6), sums, 6);
            sum = vmlal_laneq_s16(sum, of(7), sums, 7);
        }
        return sum;
    }

    template <int T>
    void add_to(const BlockK* const x[T], int n, float (*totals)[8]) const {
        int32x4_t sums[Tile::kVectors][T / Tile::kTokens];
        for (auto& vector : sums) {
            for (auto& sum : vector) sum = vdupq_n_s32(0);
        }
        for (int j = 0; j < B::kGroups; ++j) {
            int32x4_t more[Tile::kVectors][T / Tile::kTokens];
            Tile::multiply<kIsNarrow<B>, kSteps, T>(codes, kSteps * j, x, more);
            for (int v = 0; v < Tile::kVectors; ++v) {
                const int32x4_t scale = vld1q_s32(scales[j][v]);
                for (int i = 0; i < T / Tile::kTokens; ++i) sums[v][i] = vmlaq_s32(sums[v][i], more[v][i], scale);
            }
        }
        int32x4_t by_row[2][T];
        Tile::sort_by_row<T>(sums, by_row);
        for (int t = 0; t < n; ++t) {
            for (int v = 0; v < 2; ++v) {
                float32x4_t term = vmulq_f32(vld1q_f32(d + 4 * v), vcvtq_f32_s32(by_row[v][t]));
                if constexpr (B::kHasMinima) {
                    const float32x4_t low = vcvtq_f32_s32(weigh_minima(v, *x[t]));
                    term = vsubq_f32(term, vmulq_f32(vld1q_f32(dmin + 4 * v), low));
                }
                add_term(totals[t] + 4 * v, x[t]->scale, term);
            }
        }
    }
};

template <class B>
struct SmallPanel {
    using Type = B;

    alignas(64) int8_t codes[2 * kStepBytes];
    float d[8], dmin[8];

    void unpack(const uint8_t* const blocks[8]) {
        unpack_steps<B>(blocks, 0, codes);
        eight<B::d>(blocks, d);
        if constexpr (B::kHasMinima) eight<B::dmin>(blocks, dmin);
    }

    template <int T>
    void add_to(const Block8* const x[T], int n, float (*totals)[8]) const {
        int32x4_t sums[Tile::kVectors][T / Tile::kTokens], by_row[2][T];
        Tile::multiply<kIsNarrow<B>, 2, T>(codes, 0, x, sums);
        Tile::sort_by_row<T>(sums, by_row);
        for (int t = 0; t < n; ++t) {
            for (int v = 0; v < 2; ++v) {
                float32x4_t term = vmulq_f32(vld1q_f32(d + 4 * v), vcvtq_f32_s32(by_row[v][t]));
                if constexpr (B::kHasMinima) {
                    const float32x4_t low = vdupq_n_f32(float(x[t]->sum));
                    term = vsubq_f32(term, vmulq_f32(vld1q_f32(dmin + 4 * v), low));
                }
                add_term(totals[t] + 4 * v, x[t]->scale, term);
            }
        }
    }
};

// Up to T activation rows; missing ones are the last one again.
template <int T, class Panel>
inline void add_rows(const Panel& panel, const typename Panel::Type::X* x, int n, float (*totals)[8]) {
    const typename Panel::Type::X* rows[T];
    for (int t = 0; t < T; ++t) rows[t] = x + (t < n ? t : n - 1);
    panel.template add_to<T>(rows, n, totals);
}

template <class Panel>
void add_block(const Panel& panel, const typename Panel::Type::X* x, int n, float (*totals)[8]) {
    int t = 0;
    for (; t + 4 <= n; t += 4) add_rows<4>(panel, x + t, 4, totals + t);
    for (; t < n; t += 2) add_rows<2>(panel, x + t, n - t < 2 ? 1 : 2, totals + t);
}

template <class B>
void dot_eight(const uint8_t* rows, size_t row_bytes, int n_rows, const Activations& a, float* out,
               int64_t out_stride) {
    for (int64_t t0 = 0; t0 < a.n; t0 += kTileRows) {
        const int n = a.n - t0 < kTileRows ? int(a.n - t0) : kTileRows;
        float totals[kTileRows][8];
        std::memset(totals, 0, sizeof(totals));
        for (int64_t b = 0; b < a.cols / B::kWeights; ++b) {
            const uint8_t* blocks[8];
            for (int r = 0; r < 8; ++r) {  // missing rows: the last one again
                blocks[r] = rows + size_t(r < n_rows ? r : n_rows - 1) * row_bytes + size_t(b) * B::kBytes;
            }
            std::conditional_t<B::kWeights == kKBlock, BigPanel<B>, SmallPanel<B>> panel;
            panel.unpack(blocks);
            add_block(panel, B::activations(a) + b * a.n + t0, n, totals);
        }
        for (int t = 0; t < n; ++t) std::memcpy(out + (t0 + t) * out_stride, totals[t], size_t(n_rows) * 4);
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

template <class B>
struct Quantised {
    static constexpr MatrixKernels kernels() {
        return {{rows_of<B, 1>(), rows_of<B, 2>()}, dot_panel<B>, kPanelFrom, B::kWeights, B::kBytes};
    }
};
