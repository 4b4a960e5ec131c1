// Rows of K and V, and attention to them: part of generic.inl, which includes it.

// How 16 values of a row of K or V, from column c on, become floats.
template <class T>
struct FloatRow {
    static const typename T::Element* at(const uint8_t* row, int64_t c) { return (const typename T::Element*)row + c; }
    static Lanes load(const uint8_t* row, int64_t c) { return T::load(at(row, c)); }
    static Lanes load_some(const uint8_t* row, int64_t c, int64_t n) { return load_some_as<T>(at(row, c), n); }
};
struct Q8Row {
    static Lanes load(const uint8_t* row, int64_t c) {
        const uint8_t* block = row + c / kQ8Block * kQ8Bytes;
        return Lanes::load_int8((const int8_t*)block + 2 + c % kQ8Block) * Lanes::set_half(load_u16(block));
    }
    static Lanes load_some(const uint8_t* row, int64_t c, int64_t) { return load(row, c); }  // blocks are whole
};

void store_half_row(const float* x, int64_t n, uint8_t* row) {
    auto* out = (uint16_t*)row;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) Lanes::load(x + i).store_half(out + i);
    for (; i < n; ++i) out[i] = float_to_half(x[i]);
}

void store_q8_row(const float* x, int64_t n, uint8_t* row) {
    for (int64_t i = 0; i < n; i += kQ8Block, row += kQ8Bytes) {
        const uint16_t scale = float_to_half(quantize_run(x + i, kQ8Block, (int8_t*)row + 2));
        std::memcpy(row, &scale, 2);
    }
}

void store_row(KvType type, const float* x, int64_t n, uint8_t* out) {
    switch (type) {
        case KvType::F32: std::memcpy(out, x, size_t(n) * 4); return;
        case KvType::F16: store_half_row(x, n, out); return;
        case KvType::Q8_0: store_q8_row(x, n, out); return;
    }
}

// Positions whose scores are held at once; counted from position 0, so that the chunk does not matter.
constexpr int kTile = 32;

// Positions of a tile that are seen: those before `begin` lie outside the window, those from `end` on were not reached.
struct Seen {
    int begin, end;
};

// scores[g][j] = scale * (q_g . k_j)
template <class Row, int G>
void score_tile(const float* q, const uint8_t* k, const CacheShape& shape, Seen seen, float scale,
                float scores[][kTile]) {
    const int64_t dim = shape.head_dim, stride = shape.row_bytes;
    k += seen.begin * stride;
    for (int j = seen.begin; j < seen.end; ++j, k += stride) {
        Lanes total[G];
        for (int g = 0; g < G; ++g) total[g] = Lanes::set(0);
        int64_t c = 0;
        for (; c + 16 <= dim; c += 16) {
            const Lanes ks = Row::load(k, c);
            for (int g = 0; g < G; ++g) total[g] = total[g] + ks * Lanes::load(q + g * dim + c);
        }
        if (c < dim) {
            const Lanes ks = Row::load_some(k, c, dim - c);
            for (int g = 0; g < G; ++g) total[g] = total[g] + ks * load_some(q + g * dim + c, dim - c);
        }
        for (int g = 0; g < G; ++g) scores[g][j] = total[g].sum() * scale;
    }
}

// out_g = out_g * fade_g + sum over j of scores[g][j] * v_j
template <class Row, int G>
void add_values(const uint8_t* v, const CacheShape& shape, Seen seen, const float scores[][kTile], const float* fade,
                float* out) {
    const int64_t dim = shape.head_dim, stride = shape.row_bytes;
    v += seen.begin * stride;
    for (int64_t c = 0; c < dim; c += 16) {
        const int64_t width = dim - c < 16 ? dim - c : 16;
        Lanes total[G];
        for (int g = 0; g < G; ++g) total[g] = load_some(out + g * dim + c, width) * Lanes::set(fade[g]);
        const uint8_t* row = v;
        for (int j = seen.begin; j < seen.end; ++j, row += stride) {
            const Lanes vs = width == 16 ? Row::load(row, c) : Row::load_some(row, c, width);
            for (int g = 0; g < G; ++g) total[g] = total[g] + Lanes::set(scores[g][j]) * vs;
        }
        for (int g = 0; g < G; ++g) store_some(total[g], out + g * dim + c, width);
    }
}

inline void fill_unseen(float* scores, Seen seen, float value) {
    for (int j = 0; j < seen.begin; ++j) scores[j] = value;
    for (int j = seen.end; j < kTile; ++j) scores[j] = value;
}

// Gemma 2's soft cap: cap * tanh(score / cap).
inline void cap_scores(float* scores, Seen seen, float cap) {
    fill_unseen(scores, seen, 0.0f);
    const Lanes caps = Lanes::set(cap);
    for (int j = 0; j < kTile; j += 16) (caps * tanh(Lanes::load(scores + j) / caps)).store(scores + j);
}

// Online softmax (Milakov and Gimelshein 2018) over tiles; scores become weights in place.
// Returns by how much what was summed before shrinks; `top` and `sum` move on.
inline float soften(float* scores, Seen seen, float& top, float& sum) {
    float new_top = top;
    for (int j = seen.begin; j < seen.end; ++j) new_top = scores[j] > new_top ? scores[j] : new_top;
    fill_unseen(scores, seen, new_top);
    const Lanes tops = Lanes::set(new_top);
    float fade[16];
    exp(Lanes::set(top) - tops).store(fade);
    for (int j = 0; j < kTile; j += 16) exp(Lanes::load(scores + j) - tops).store(scores + j);
    fill_unseen(scores, seen, 0.0f);
    sum = sum * fade[0] + (Lanes::load(scores) + Lanes::load(scores + 16)).sum();
    top = new_top;
    return fade[0];
}

// Tiles that lie wholly before the window are not looked at.
template <class Row, int G>
void attend_group(const float* q, const uint8_t* k, const uint8_t* v, const CacheShape& shape, int64_t n_positions,
                  const AttentionRule& rule, float* out) {
    const int64_t dim = shape.head_dim;
    const int64_t first = rule.window > 0 && rule.window < n_positions ? n_positions - rule.window : 0;
    float scores[G][kTile], top[G], sum[G], fade[G];
    for (int g = 0; g < G; ++g) top[g] = -3.0e38f, sum[g] = 0.0f;
    std::memset(out, 0, size_t(G * dim) * 4);
    for (int64_t j = first / kTile * kTile; j < n_positions; j += kTile) {
        const Seen seen{j < first ? int(first - j) : 0, n_positions - j < kTile ? int(n_positions - j) : kTile};
        score_tile<Row, G>(q, k + j * shape.row_bytes, shape, seen, rule.scale, scores);
        for (int g = 0; g < G; ++g) {
            if (rule.softcap > 0) cap_scores(scores[g], seen, rule.softcap);
            fade[g] = soften(scores[g], seen, top[g], sum[g]);
        }
        add_values<Row, G>(v + j * shape.row_bytes, shape, seen, scores, fade, out);
    }
    for (int g = 0; g < G; ++g) {
        for (int64_t c = 0; c < dim; ++c) out[g * dim + c] /= sum[g];
    }
}

template <class Row>
void attend_heads(const float* q, const Cache& cache, int64_t kv_head, int64_t group, int64_t n_positions,
                  const AttentionRule& rule, float* out) {
    const CacheShape& shape = cache.shape;
    const int64_t offset = kv_head * shape.capacity * shape.row_bytes;
    const uint8_t *k = cache.k + offset, *v = cache.v + offset;
    for (; group >= 4; group -= 4, q += 4 * shape.head_dim, out += 4 * shape.head_dim) {
        attend_group<Row, 4>(q, k, v, shape, n_positions, rule, out);
    }
    if (group == 3) attend_group<Row, 3>(q, k, v, shape, n_positions, rule, out);
    if (group == 2) attend_group<Row, 2>(q, k, v, shape, n_positions, rule, out);
    if (group == 1) attend_group<Row, 1>(q, k, v, shape, n_positions, rule, out);
}

void attend(const float* q, const Cache& cache, int64_t kv_head, int64_t group, int64_t n_positions,
            const AttentionRule& rule, float* out) {
    auto heads = attend_heads<FloatRow<F16Type>>;
    if (cache.shape.type == KvType::F32) heads = attend_heads<FloatRow<F32Type>>;
    if (cache.shape.type == KvType::Q8_0) heads = attend_heads<Q8Row>;
    heads(q, cache, kv_head, group, n_positions, rule, out);
}
