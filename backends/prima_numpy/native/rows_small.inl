// Products of four weight rows with T activation rows, for types with blocks of 32. Included inside an x86 variant's
// namespace behind its `Wide`, with `dot_codes`: see rows_x86.inl.
//
// The float work of a block is as much as its integers', so as many consecutive blocks as a register has lanes are taken
// at once: a lane is a block while codes are multiplied, and then holds the block's four sums, one per row.

// Codes of weights 0..15 and 16..31 of consecutive blocks, unsigned except where `dot_codes` takes signed ones.
template <class B>
PRIMA_INLINE void take_apart(const uint8_t* block, Wide& low, Wide& high) {
    if constexpr (std::is_same_v<B, Q8_0>) {
        low = Wide::lanes(block + 2, B::kBytes);
        high = Wide::lanes(block + 18, B::kBytes);
        if constexpr (kDotsAnyBytes) low = low ^ Wide::set(128), high = high ^ Wide::set(128);
        return;
    }
    const Wide packed = Wide::lanes(block + B::kBytes - 16, B::kBytes);
    low = packed.low_nibbles();
    high = packed.high_nibbles();
    if constexpr (B::kIsSigned) {
        constexpr bool is_mxfp4 = std::is_same_v<B, MXFP4>;
        Wide levels = Wide::same(is_mxfp4 ? kMxfp4 : kIq4Nl);
        if constexpr (kDotsAnyBytes) levels = levels ^ Wide::set(128);
        low = levels.shuffle(low);
        high = levels.shuffle(high);
    } else if constexpr (B::kLargest == 31) {  // fifth bits in the four bytes before the nibbles
        constexpr int at = B::kBytes - 20;
        const __m128i bits = _mm_set1_epi64x((long long)0x8040201008040201ull);
        const __m128i first = _mm_setr_epi32(at * 0x01010101, at * 0x01010101, (at + 1) * 0x01010101,
                                             (at + 1) * 0x01010101);
        const __m128i second = _mm_add_epi8(first, _mm_set1_epi8(2));
        const Wide heads = Wide::lanes(block, B::kBytes), bit = Wide::same(&bits);
        low = low.plus_16_where(heads.shuffle(Wide::same(&first)), bit);
        high = high.plus_16_where(heads.shuffle(Wide::same(&second)), bit);
    }
}

template <class B>
PRIMA_INLINE void take_units(const uint8_t* const blocks[4], Fours& d, Fours& minimum) {
    constexpr int last = (Wide::kLanes - 1) * B::kBytes + (B::kHasMinima ? 4 : 2);
    Wide words;
    if constexpr (last <= 64 && Wide::kLanes == 4) {
        words = first_words<B::kBytes>(blocks);
    } else {
        const auto heads = [&](int r) { return Wide::lanes(blocks[r], B::kBytes); };
        words = first_words(heads(0), heads(1), heads(2), heads(3));
    }
    if constexpr (B::kHasHalves) {
        d = Fours::of_low_halves(words);
    } else {
        d = Fours::of_exponents(words);
    }
    if constexpr (B::kHasMinima) minimum = Fours::of_high_halves(words);
}

// Wide::kLanes blocks of each row; activations `stride` blocks apart. The first `count` count.
template <class B, int T>
PRIMA_INLINE void add_small_blocks(const uint8_t* const blocks[4], const Block8* x, int64_t stride, int count,
                                   Totals<T>& totals) {
    constexpr int offset = B::kIsSigned && kDotsAnyBytes ? 128 : B::kOffset;
    const int64_t x_stride = stride * int64_t(sizeof(Block8));
    Wide x_low[T], x_high[T], start[T], sums[T][4];
    for (int t = 0; t < T; ++t) {
        x_low[t] = Wide::lanes(x[t].q, x_stride);
        x_high[t] = Wide::lanes(x[t].q + 16, x_stride);
        start[t] = Wide::zero();
        if constexpr (offset != 0) {
            const Wide code = Wide::set(offset);
            start[t] = start[t] - dot_codes<B>(start[t], code, code, x_low[t], x_high[t]);
        }
    }
    PRIMA_UNROLL
    for (int r = 0; r < 4; ++r) {
        Wide low, high;
        take_apart<B>(blocks[r], low, high);
        for (int t = 0; t < T; ++t) sums[t][r] = dot_codes<B>(start[t], low, high, x_low[t], x_high[t]);
    }
    Fours d, minimum, terms[T];
    take_units<B>(blocks, d, minimum);
    for (int t = 0; t < T; ++t) {
        Fours term = d * Fours::of_ints(add_in_lanes(sums[t][0], sums[t][1], sums[t][2], sums[t][3]));
        if constexpr (B::kHasMinima) {
            term = term + minimum * Fours::of_ints(Wide::spread(&x[t].sum, x_stride));
        }
        terms[t] = Fours::spread(&x[t].scale, x_stride) * term;
    }
    totals.add(terms, count);
}

template <class B, int T>
void dot_small_rows(const uint8_t* const rows[4], const Activations& a, int64_t t, float* out) {
    constexpr int lanes = Wide::kLanes;
    Totals<T> totals;
    const Block8* x = a.q8 + t;
    const int64_t n_blocks = a.cols / kQ8Block;
    int64_t b = 0;
    for (; b + lanes <= n_blocks; b += lanes, x += lanes * a.n) {
        const uint8_t* blocks[4];
        for (int r = 0; r < 4; ++r) {
            blocks[r] = rows[r] + b * B::kBytes;
            for (int i = 0; i < lanes * B::kBytes; i += 64) prefetch(blocks[r] + kPrefetchBytes + i);
        }
        add_small_blocks<B, T>(blocks, x, a.n, lanes, totals);
    }
    if (b < n_blocks) {  // copies, with zeros behind them: what is read past the last block counts for nothing
        const int count = int(n_blocks - b);
        uint8_t rest[4][lanes * B::kBytes] = {};
        Block8 x_rest[lanes][T] = {};
        const uint8_t* blocks[4];
        for (int r = 0; r < 4; ++r) {
            std::memcpy(rest[r], rows[r] + b * B::kBytes, size_t(count * B::kBytes));
            blocks[r] = rest[r];
        }
        for (int i = 0; i < count; ++i) std::memcpy(x_rest[i], x + i * a.n, sizeof(x_rest[i]));
        add_small_blocks<B, T>(blocks, x_rest[0], T, count, totals);
    }
    totals.store(out);
}
