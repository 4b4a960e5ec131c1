// Attention to rows of K and V: part of generic.inl, which includes it after kv_rows.inl.
//
// Positions are walked in segments of kSegment, counted from 0. In each one all scores of a query come first, then
// softmax, then the sum of the rows of V; the result is folded into that of the segments before. Segments may be
// computed apart and folded later, in the same order, to the same bits, whatever the rows, threads or pieces of a
// prompt. A score has 16 partial sums along the head, whose halves are added; the sum of weights has 16, by position;
// a column's sum of values runs from the first position to the last.

// Positions of a segment that a query sees: none where begin == end.
struct Seen {
    int begin, end;

    bool is_empty() const { return begin >= end; }
};

inline Seen seen_in(int64_t segment, int64_t position, int64_t window) {
    const auto inside = [&](int64_t p) {
        const int64_t offset = p - segment * kSegment;
        return int(offset < 0 ? 0 : offset < kSegment ? offset : kSegment);
    };
    const int64_t after = position + 1;
    return {window > 0 && window < after ? inside(after - window) : 0, inside(after)};
}

inline Seen join(Seen a, Seen b) {
    if (a.is_empty()) return b;
    if (b.is_empty()) return a;
    return {a.begin < b.begin ? a.begin : b.begin, a.end > b.end ? a.end : b.end};
}

inline Seen meet(Seen a, Seen b) {
    return {a.begin > b.begin ? a.begin : b.begin, a.end < b.end ? a.end : b.end};
}

constexpr int kBlock = 4;            // queries that share a row of K or V while it is in registers
constexpr int kScores = 16;          // positions whose scores are made at once
constexpr int kTilePositions = 64;   // rows of V that are widened at once
constexpr int kTileColumns = 512;    // of the longest head whose rows are widened once for all queries
constexpr int kSlab = 16 * kValueVectors;  // columns of V whose sums are in registers
static_assert(kTilePositions * kSlab <= kScores * kTileColumns, "both use the same memory");

// Queries of a call and what becomes of them: on the stack, under 90 KiB.
struct alignas(64) Desk {
    float scores[kQueries][kSegment];  // then weights
    float tile[kScores * kTileColumns];
    float parts[kBlock * kScores * 16];
    float sums[kQueries][kSlab];
    float fade[kQueries], share[kQueries];  // of what came before, and of the segment
    const float* q[kQueries];
    float* out[kQueries];
    Seen seen[kQueries];
    Softmax states[kQueries];
    int n;
};

// Rows of a segment that are wanted soon. They are fetched as four streams, a quarter of them each: with one, a core
// waits for memory 1.3 times as long, for the CPU's own prefetcher looks only so far ahead in each stream.
struct Ahead {
    const uint8_t* rows = nullptr;  // null: nothing is wanted
    int64_t n_bytes = 0;

    // The part of them that a step of so many bytes, at `begin` of as many in all, has to ask for.
    void fetch(int64_t begin, int64_t step) const {
        if (!rows) return;
        for (int64_t i = begin / 4; i < (begin + step) / 4; i += 64) {
            for (int s = 0; s < 4; ++s) prefetch(rows + s * (n_bytes / 4) + i);
        }
    }
};

// ---------------------------------------------------------------- scores

// parts[g][p] = the 16 partial sums of q_g . k_p
template <class Row, int G, int P>
inline void dot_positions(const float* const* q, const uint8_t* k, int64_t stride, int64_t dim, float* parts) {
    Lanes total[P][G];
    for (int p = 0; p < P; ++p) {
        for (int g = 0; g < G; ++g) total[p][g] = Lanes::set(0);
    }
    int64_t c = 0;
    for (; c + 16 * Row::kStep <= dim; c += 16 * Row::kStep) {
        Lanes ks[P][Row::kStep];
        for (int p = 0; p < P; ++p) Row::template load<Row::kStep>(k + p * stride, c, ks[p]);
        for (int i = 0; i < Row::kStep; ++i) {
            for (int g = 0; g < G; ++g) {
                const Lanes qs = Lanes::load(q[g] + c + 16 * i);
                for (int p = 0; p < P; ++p) total[p][g] = total[p][g] + ks[p][i] * qs;
            }
        }
    }
    if (c < dim) {
        for (int g = 0; g < G; ++g) {
            const Lanes qs = load_some(q[g] + c, dim - c);
            for (int p = 0; p < P; ++p) total[p][g] = total[p][g] + Row::load_some(k + p * stride, c, dim - c) * qs;
        }
    }
    for (int g = 0; g < G; ++g) {
        for (int p = 0; p < P; ++p) total[p][g].store(parts + (g * kScores + p) * 16);
    }
}

// scores[g][j] = scale * (q_g . k_j) for those of 16 positions that are seen; others get any value.
template <class Row, int G>
void score_rows(const float* const* q, const uint8_t* k, int64_t stride, int64_t dim, Seen seen, float scale,
                const Ahead& ahead, float* parts, float (*scores)[kSegment], int at) {
    constexpr int P = kScorePositions;
    if (seen.end - seen.begin < kScores) std::memset(parts, 0, size_t(G * kScores * 16) * sizeof(float));
    int j = seen.begin;
    for (; j + P <= seen.end; j += P) {
        ahead.fetch((at + j) * stride, P * stride);
        dot_positions<Row, G, P>(q, k + j * stride, stride, dim, parts + j * 16);
    }
    for (; j < seen.end; ++j) dot_positions<Row, G, 1>(q, k + j * stride, stride, dim, parts + j * 16);
    for (int g = 0; g < G; ++g) (Lanes::sums(parts + g * kScores * 16) * Lanes::set(scale)).store(scores[g] + at);
}

template <class Row>
void score_block(Desk& d, int i, const uint8_t* k, int64_t stride, int64_t dim, int at, float scale,
                 const Ahead& ahead) {
    const int g = d.n - i < kBlock ? d.n - i : kBlock;
    Seen seen = d.seen[i];
    for (int h = 1; h < g; ++h) seen = join(seen, d.seen[i + h]);
    seen = meet({seen.begin - at, seen.end - at}, {0, kScores});
    if (seen.is_empty()) return;
    const auto score = g == 4   ? score_rows<Row, 4>
                       : g == 3 ? score_rows<Row, 3>
                       : g == 2 ? score_rows<Row, 2>
                                : score_rows<Row, 1>;
    score(d.q + i, k, stride, dim, seen, scale, ahead, d.parts, d.scores + i, at);
}

// ---------------------------------------------------------------- softmax

// Gemma 2's soft cap: cap * tanh(score / cap).
inline Lanes capped(Lanes scores, Lanes cap) { return cap * tanh(scores / cap); }

inline void fill_unseen(float* scores, Seen seen, float value) {
    for (int j = seen.begin / 16 * 16; j < seen.begin; ++j) scores[j] = value;
    for (int j = seen.end; j % 16 != 0; ++j) scores[j] = value;
}

// Folds a segment into a softmax: by how much what came before shrinks, and the segment.
// Online softmax (Milakov and Gimelshein 2018).
inline void fold(Softmax& all, Softmax one, float& fade, float& share) {
    const float top = one.top > all.top ? one.top : all.top;
    float e[16] = {all.top - top, one.top - top};
    exp(Lanes::load(e)).store(e);
    fade = e[0], share = e[1];
    all = {top, all.sum * fade + one.sum * share};
}

inline void fold_columns(float* out, const float* sums, int64_t n, float fade, float share) {
    const Lanes fades = Lanes::set(fade), shares = Lanes::set(share);
    int64_t c = 0;
    for (; c + 16 <= n; c += 16) (Lanes::load(out + c) * fades + Lanes::load(sums + c) * shares).store(out + c);
    for (; c < n; ++c) out[c] = out[c] * fade + sums[c] * share;
}

constexpr float kLowest = -3.0e38f;

// Scores become weights in place: zeros up to the next 16 positions on either side of those seen.
inline Softmax soften(float* scores, Seen seen, float softcap) {
    const int begin = seen.begin / 16 * 16;
    if (softcap > 0) {
        const Lanes cap = Lanes::set(softcap);
        for (int j = begin; j < seen.end; j += 16) capped(Lanes::load(scores + j), cap).store(scores + j);
    }
    fill_unseen(scores, seen, kLowest);
    Lanes tops = Lanes::set(kLowest);
    for (int j = begin; j < seen.end; j += 16) tops = max(Lanes::load(scores + j), tops);
    float top[16];
    tops.store(top);
    for (int l = 1; l < 16; ++l) top[0] = top[l] > top[0] ? top[l] : top[0];
    tops = Lanes::set(top[0]);
    for (int j = begin; j < seen.end; j += 16) exp(Lanes::load(scores + j) - tops).store(scores + j);
    fill_unseen(scores, seen, 0.0f);
    Lanes sum = Lanes::set(0);
    for (int j = begin; j < seen.end; j += 16) sum = sum + Lanes::load(scores + j);
    return {top[0], sum.sum()};
}

// ---------------------------------------------------------------- values

// sums_g[c] += weights[g][j] * v_j[c] for n positions and W vectors of columns from c on, or `width` columns.
template <class Row, int G, int W>
void add_rows(const uint8_t* v, int64_t stride, int64_t c, int64_t width, int n, const float* weights, float* sums,
              const Ahead& ahead, int at) {
    Lanes total[G][W];
    for (int g = 0; g < G; ++g) {
        for (int w = 0; w < W; ++w) total[g][w] = Lanes::load(sums + g * kSlab + 16 * w);
    }
    for (int j = 0; j < n; ++j, v += stride) {
        ahead.fetch(kSegment * Row::offset(c) + (at + j) * W * Row::kBytes, W * Row::kBytes);
        Lanes vs[W];
        if (W > 1 || width >= 16) {
            Row::template load<W>(v, c, vs);
        } else {
            vs[0] = Row::load_some(v, c, width);
        }
        for (int g = 0; g < G; ++g) {
            const Lanes weight = Lanes::set(weights[g * kSegment + j]);
            for (int w = 0; w < W; ++w) total[g][w] = total[g][w] + weight * vs[w];
        }
    }
    for (int g = 0; g < G; ++g) {
        for (int w = 0; w < W; ++w) total[g][w].store(sums + g * kSlab + 16 * w);
    }
}

// `width` columns from `column` on of the rows of V from position `first` of a segment on.
struct Slab {
    const uint8_t* rows;
    int64_t stride;
    int64_t column, width;
    int first;
    Ahead ahead;
};

template <class Row, int W>
void add_run(Desk& d, int i, int g, const Slab& s, Seen run) {
    if (run.is_empty()) return;
    const auto add = g == 4   ? add_rows<Row, 4, W>
                     : g == 3 ? add_rows<Row, 3, W>
                     : g == 2 ? add_rows<Row, 2, W>
                              : add_rows<Row, 1, W>;
    const int64_t offset = (run.begin - s.first) * s.stride;
    add(s.rows + offset, s.stride, s.column, s.width, run.end - run.begin, d.scores[i] + run.begin, d.sums[i],
        s.ahead, run.begin);
}

// Positions that all queries of a block see are added for all at once, others query by query: what a query does not
// see may be infinite, which no weight of zero would hide.
template <class Row, int W>
void add_block(Desk& d, int i, const Slab& s, Seen tile) {
    const int g = d.n - i < kBlock ? d.n - i : kBlock;
    Seen common = tile;
    for (int h = i; h < i + g; ++h) common = meet(common, d.seen[h]);
    if (common.is_empty()) common = {tile.end, tile.end};
    for (int h = i; h < i + g; ++h) add_run<Row, W>(d, h, 1, s, meet(meet(tile, d.seen[h]), {0, common.begin}));
    add_run<Row, W>(d, i, g, s, common);
    for (int h = i; h < i + g; ++h) add_run<Row, W>(d, h, 1, s, meet(meet(tile, d.seen[h]), {common.end, kSegment}));
}

// Rows as floats, each [columns up to the next 16].
template <class Row>
void widen(const uint8_t* rows, int64_t stride, int64_t c, int64_t width, int n, float* out) {
    for (int j = 0; j < n; ++j, rows += stride) {
        constexpr int N = Row::kStep;
        int64_t i = 0;
        for (; i + 16 * N <= width; i += 16 * N) {
            Lanes values[N];
            Row::template load<N>(rows, c + i, values);
            for (int l = 0; l < N; ++l, out += 16) values[l].store(out);
        }
        if (i < width) Row::load_some(rows, c + i, width - i).store(out), out += 16;
    }
}

inline int64_t widened_bytes(int64_t width) { return (width + 15) / 16 * 64; }

template <class Row, int W>
void sum_values(Desk& d, const uint8_t* v, int64_t stride, int64_t c, int64_t width, Seen seen, bool widens,
                const Ahead& ahead) {
    std::memset(d.sums, 0, size_t(d.n) * sizeof(d.sums[0]));
    const int step = widens ? kTilePositions : kSegment;
    for (int t = seen.begin; t < seen.end; t += step) {
        const Seen tile{t, t + step < seen.end ? t + step : seen.end};
        if (widens) widen<Row>(v + t * stride, stride, c, width, tile.end - t, d.tile);
        const Slab wide{(const uint8_t*)d.tile, widened_bytes(width), 0, width, t, {}};
        const Slab own{v + t * stride, stride, c, width, t, ahead};
        for (int i = 0; i < d.n; i += kBlock) {
            if (widens) {
                add_block<F32Row, W>(d, i, wide, tile);
            } else {
                add_block<Row, W>(d, i, own, tile);
            }
        }
    }
    for (int i = 0; i < d.n; ++i) fold_columns(d.out[i] + c, d.sums[i], width, d.fade[i], d.share[i]);
}

// ---------------------------------------------------------------- both

template <class Row>
void attend_segment(Desk& d, const uint8_t* k, const uint8_t* v, const CacheShape& shape, const AttentionRule& rule,
                    Seen seen, const Ahead& next_k) {
    const int64_t dim = shape.head_dim, stride = shape.row_bytes;
    const bool widens = d.n > kBlock && dim <= kTileColumns;
    const Ahead values{v, seen.end * stride};
    for (int at = seen.begin / kScores * kScores; at < seen.end; at += kScores) {
        const Seen rows = meet({seen.begin - at, seen.end - at}, {0, kScores});
        const uint8_t* own = k + at * stride;
        if (widens) {
            values.fetch(at * stride, kScores * stride);
            next_k.fetch(at * stride, kScores * stride);
            widen<Row>(own + rows.begin * stride, stride, 0, dim, rows.end - rows.begin,
                       d.tile + rows.begin * widened_bytes(dim) / 4);
        }
        for (int i = 0; i < d.n; i += kBlock) {
            if (widens) {
                score_block<F32Row>(d, i, (const uint8_t*)d.tile, widened_bytes(dim), dim, at, rule.scale, {});
            } else {
                score_block<Row>(d, i, own, stride, dim, at, rule.scale, values);
            }
        }
    }
    for (int i = 0; i < d.n; ++i) {
        fold(d.states[i], soften(d.scores[i], d.seen[i], rule.softcap), d.fade[i], d.share[i]);
    }
    int64_t c = 0;
    for (; c + kSlab <= dim; c += kSlab) sum_values<Row, kValueVectors>(d, v, stride, c, kSlab, seen, widens, next_k);
    for (; c < dim; c += 16) sum_values<Row, 1>(d, v, stride, c, dim - c < 16 ? dim - c : 16, seen, widens, next_k);
}

inline void divide(float* x, int64_t n, float divisor) {
    for (int64_t i = 0; i < n; ++i) x[i] /= divisor;
}

// Where the sums of the queries go.
inline void start_sums(Desk& d, const Queries& a, int64_t dim, float* out, int64_t out_stride) {
    for (int i = 0; i < d.n; ++i) {
        d.out[i] = out + i / a.n_heads * out_stride + i % a.n_heads * dim;
        d.states[i] = {kLowest, 0.0f};
        std::memset(d.out[i], 0, size_t(dim) * 4);
    }
}

template <class Row>
void attend_as(const Queries& a, const Cache& cache, const AttentionRule& rule, int64_t s0, int64_t s1, float* out,
               int64_t out_stride, Softmax* parts) {
    const CacheShape& shape = cache.shape;
    const int64_t dim = shape.head_dim, segment_bytes = kSegment * shape.row_bytes;
    Desk d;
    d.n = int(a.n_rows * a.n_heads);
    for (int i = 0; i < d.n; ++i) d.q[i] = a.q + i / a.n_heads * a.row_stride + i % a.n_heads * dim;
    start_sums(d, a, dim, out, out_stride);
    int64_t at = a.kv_head * shape.capacity * shape.row_bytes + s0 * segment_bytes;
    for (int64_t s = s0; s < s1; ++s, at += segment_bytes) {
        Seen seen{0, 0};
        for (int i = 0; i < d.n; ++i) {
            d.seen[i] = seen_in(s, a.position + i / a.n_heads, rule.window);
            seen = join(seen, d.seen[i]);
        }
        const Ahead next_k = s + 1 < s1 ? Ahead{cache.k + at + segment_bytes, segment_bytes} : Ahead{};
        attend_segment<Row>(d, cache.k + at, cache.v + at, shape, rule, seen, next_k);
        if (!parts) continue;
        std::memcpy(parts, d.states, size_t(d.n) * sizeof(Softmax));
        parts += d.n, out += a.n_rows * out_stride;
        if (s + 1 < s1) start_sums(d, a, dim, out, out_stride);
    }
    if (parts) return;
    for (int i = 0; i < d.n; ++i) divide(d.out[i], dim, d.states[i].sum);
}

void attend(const Queries& a, const Cache& cache, const AttentionRule& rule, int64_t s0, int64_t s1, float* out,
            int64_t out_stride, Softmax* parts) {
    auto attend_rows = attend_as<FloatRow<F16Type>>;
    if (cache.shape.type == KvType::F32) attend_rows = attend_as<F32Row>;
    if (cache.shape.type == KvType::Q8_0) attend_rows = attend_as<Q8Row>;
    attend_rows(a, cache, rule, s0, s1, out, out_stride, parts);
}

void merge(const float* sums, const Softmax* parts, int64_t n, int64_t stride, int64_t dim, float* out) {
    Softmax all{kLowest, 0.0f};
    std::memset(out, 0, size_t(dim) * 4);
    for (int64_t s = 0; s < n; ++s) {
        float fade, share;
        fold(all, parts[s * stride], fade, share);
        fold_columns(out, sums + s * stride * dim, dim, fade, share);
    }
    divide(out, dim, all.sum);
}
