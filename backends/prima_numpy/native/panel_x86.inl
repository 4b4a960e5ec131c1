// Products of many weight rows with many activation rows. Included inside an x86 variant's namespace, which says how
// codes and activations are multiplied (`dot_bytes`, `add_pairs`) and how large tiles are.
//
// The lanes are activation rows, put side by side 16 at a time once per call (SixteenK, Sixteen8), so that weights need
// only be taken apart, not transposed: four codes of a row are broadcast against vectors of activation rows, and scales,
// minima and d are broadcast in the same way. What is loaded serves a tile of weight rows by vectors of activation rows,
// wide enough that the multipliers and not the loads are the limit. Totals come out with the activation rows in the
// lanes and are transposed once, at the end.
//
// `dot_bytes` adds the products of four bytes to each lane where kDotsAnyBytes, else those of two to each word. There,
// codes whose products do not fit a word are kept as words: two are multiplied at once, added up as int32.

constexpr int kPanelFrom = 9;      // eight are as fast by fours, without being put side by side (measured)
constexpr int kPanelRowsX86 = 48;  // weight rows that are taken apart at once: 12 KB of codes, a multiple of any tile
constexpr int kLanes = Ints::kLanes;
constexpr int kWalkVectors = 512 / kLanes;  // of activation rows whose totals, 96 KB, stay in L2 beside their blocks
using VectorTotals = float[kPanelRowsX86][kLanes];

inline Ints broadcast4(const void* p) { return Ints::set(int32_t(load_u32((const uint8_t*)p))); }

// ---------------------------------------------------------------- codes and activations

// How a panel keeps a type's codes: as unsigned bytes, signed ones raised by kRaised, or as words.
template <class B>
struct Coding {
    static constexpr bool kIsWords = !kDotsAnyBytes && B::kIsSigned && B::kLargest > 64;
    static constexpr int kRaised = B::kIsSigned && !kIsWords ? B::kLargest : 0;
    static constexpr int kOffset = B::kIsSigned ? kRaised : B::kOffset;  // what stands for 0
    static constexpr int kTop = B::kLargest + kRaised;
    static constexpr int kBytes = kIsWords ? 2 : 1;  // of a code

    static constexpr int farthest(int centre) { return centre > kTop - centre ? centre : kTop - centre; }
    // Whether the products of so many quads of codes that stand for code - centre, added up, fit a word.
    static constexpr bool fits(int centre, int quads) {
        return !kIsWords && farthest(centre) * 127 * (kDotsAnyBytes ? 4 : 2) * quads <= 32767;
    }
    static constexpr int centre_for(int quads) {
        return kOffset != 0 || kIsWords || fits(0, quads) ? kOffset : (kTop + 1) / 2;
    }

    // Codes 32 i .. + 31 of a block. Words lie as `Side` gives activations.
    static void store(const uint8_t* block, int i, uint8_t* codes) {
        const __m256i v = B::codes(block, i).v;
        if constexpr (kIsWords) {
            _mm256_store_si256((__m256i*)codes, _mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8));
            _mm256_store_si256((__m256i*)(codes + 32), _mm256_srai_epi16(v, 8));
        } else {
            _mm256_store_si256((__m256i*)codes, _mm256_add_epi8(v, _mm256_set1_epi8(char(kRaised))));
        }
    }
    static PRIMA_INLINE Ints add_products(Ints sum, Ints codes, Ints x) {
        if constexpr (kIsWords) return add_pairs(sum, codes, x);
        return dot_bytes(sum, codes, x);
    }
};

// W vectors of activation rows from lane `first` of *x on, 0 where they are several, step by step: four bytes of each.
template <class X, int W, bool kIsWords>
struct Side {
    const X* x;
    int first;

    Side(const X* x, int first) : x(x), first(first) {}

    PRIMA_INLINE const X& at(int w) const { return x[w * kLanes / 16]; }
    PRIMA_INLINE int lane(int w) const { return first + w * kLanes % 16; }
    PRIMA_INLINE Ints bytes(int w, int quad) const { return Ints::load(at(w).q[quad][lane(w)]); }
    PRIMA_INLINE Ints step(int w, int k) const { return bytes(w, k); }
};

// The same as words, two of each row: of eight quads first the even bytes, then the odd ones.
template <class X, int W>
struct Side<X, W, true> : Side<X, W, false> {
    static constexpr int kQuads = int(sizeof(X::q)) / 64;
    alignas(64) int16_t words[2 * kQuads][W][2 * kLanes];

    Side(const X* x, int first) : Side<X, W, false>(x, first) {
        for (int i = 0; i < kQuads; ++i) {
            for (int w = 0; w < W; ++w) {
                const auto bytes = this->bytes(w, i);
                bytes.even_bytes().store(words[i / 8 * 16 + i % 8][w]);
                bytes.odd_bytes().store(words[i / 8 * 16 + i % 8 + 8][w]);
            }
        }
    }
    PRIMA_INLINE Ints step(int w, int k) const { return Ints::load(words[k][w]); }
};

// Rows of weights that are taken apart next, so many bytes of each: fetched beside the products of those before, a few
// at a time, so that none is awaited.
struct Wanted {
    const uint8_t* rows;  // null: none
    size_t row_bytes;
    int n_bytes;

    void fetch(int r) const {
        if (rows == nullptr) return;
        const uint8_t* row = rows + size_t(r) * row_bytes;
        for (int i = 0; i < n_bytes; i += 64) prefetch(row + i);
        prefetch(row + n_bytes - 1);
    }
};

// totals += x_scale * term
inline void add_term(float* total, const float* x_scale, Floats term) {
    (Floats::load(total) + Floats::load(x_scale) * term).store(total);
}

// -centre times the sums of n quads of activations, in each word.
template <class S>
inline Ints start_words(const S& side, int w, int quad, int n, int centre) {
    Ints sum = Ints::zero();
    for (int k = 0; k < n; ++k) sum = dot_bytes(sum, Ints::set(0x01010101), side.bytes(w, quad + k));
    return multiply_words(sum, Ints::set_words(-centre));
}

// ---------------------------------------------------------------- tiles

// One block of each of up to kPanelRowsX86 rows.
template <class B>
struct alignas(64) BigPanel {
    using X = SixteenK;
    using Code = Coding<B>;
    static constexpr int kBlocks = 1;
    static constexpr int kQuads = 64 / B::kGroups;  // of a group: four codes each

    // Products are summed part by part of a group and then weighed by its scale. A part that fits a word is weighed and
    // added by one instruction, so codes are centred (taken to stand for code - kCentre, where the sums start from
    // -kCentre * (sum of x)) and parts are made short until they fit, down to 8 weights; what still does not fit
    // is multiplied as int32, group by group. Where the weight is not centred itself, the centre is given back.
    static constexpr int kCentre = Code::centre_for(kQuads);
    static constexpr int find_part() {
        for (int quads = kQuads; quads >= 2; quads /= 2) {
            if (Code::fits(kCentre, quads)) return quads;
        }
        return 0;
    }
    static constexpr bool kIsWeighed = find_part() != 0;
    static_assert(kIsWeighed || kDotsAnyBytes || Code::kIsWords, "sums would leave their words");

    // That is for activations of any size. Nearly always they are small enough that whole groups fit, and small codes
    // without a centre: then fewer sums are weighed, and none given back.
    static constexpr int kTameCentre = Code::kOffset == 0 && Code::kTop <= 15 ? 0 : kCentre;
    static constexpr int kTameMost = 32767 / Code::farthest(kTameCentre);  // sum of magnitudes of a group's activations
    static constexpr bool kCanBeTame =
        kDotsAnyBytes && kIsWeighed && (find_part() < kQuads || kTameCentre != kCentre);

    template <bool kIsTame>
    struct Way {
        static constexpr int kCentre = kIsTame ? kTameCentre : BigPanel::kCentre;
        static constexpr int kPart = kIsTame || !kIsWeighed ? kQuads : find_part();
        static constexpr int kParts = 64 / kPart;
        static constexpr int kSteps = kPart * Code::kBytes;  // of a part
        static constexpr bool kIsGivenBack = kCentre != Code::kOffset;
    };

    uint8_t codes[kPanelRowsX86][kKBlock * Code::kBytes];
    int32_t scales[kPanelRowsX86][B::kGroups];  // where kIsWeighed for each word that counts
    int16_t given_back[kPanelRowsX86][16];      // kCentre * scale
    int16_t minima[kPanelRowsX86][16];
    float d[kPanelRowsX86], dmin[kPanelRowsX86];

    static const X* activations(const Activations& a) { return a.sixteen_k; }

    void unpack(const uint8_t* block, size_t row_bytes, int n_rows, int) {
        for (int r = 0; r < n_rows; ++r, block += row_bytes) {
            int16_t row_scales[B::kGroups];
            B::scales(block, row_scales, minima[r]);
            for (int j = 0; j < B::kGroups; j += 8) {
                const __m128i words = load128(row_scales + j);
                __m256i wide = kIsWeighed ? _mm256_cvtepu16_epi32(words) : _mm256_cvtepi16_epi32(words);
                if constexpr (kIsWeighed && !kDotsAnyBytes) wide = _mm256_or_si256(wide, _mm256_slli_epi32(wide, 16));
                _mm256_storeu_si256((__m256i*)(scales[r] + j), wide);
                const __m128i products = _mm_mullo_epi16(words, _mm_set1_epi16(short(kCentre)));
                if constexpr (Way<false>::kIsGivenBack) _mm_storeu_si128((__m128i*)(given_back[r] + j), products);
            }
            PRIMA_UNROLL
            for (int i = 0; i < 8; ++i) Code::store(block, i, codes[r] + 32 * Code::kBytes * i);
            d[r] = B::d(block);
            if constexpr (B::kHasMinima) dmin[r] = B::dmin(block);
        }
    }

    template <class How, class S>
    static Ints start_of(const S& side, int w, int p) {
        if constexpr (How::kCentre == 0) return Ints::zero();
        if constexpr (!kDotsAnyBytes) return start_words(side, w, p * How::kPart, How::kPart, How::kCentre);
        const X& x = side.at(w);
        const int16_t(*pairs)[16][2] = How::kPart == 8 ? x.sum32 : How::kPart == 4 ? x.sum16 : x.sum8;
        const Ints both = Ints::load(pairs[p / 2][side.lane(w)]);
        if constexpr (kIsWeighed) {  // the lower half of a lane counts
            return multiply_words(p % 2 ? both.high_words() : both, Ints::set_words(-How::kCentre));
        }
        return (p % 2 ? both.high_words() : both.low_words()) * Ints::set(-How::kCentre);
    }

    template <int W>
    void multiply(const X* x, int first, int64_t, int, int n_rows, const Wanted& next, VectorTotals* totals) const {
        const Side<X, W, Code::kIsWords> side(x, first);
        if constexpr (kCanBeTame) {
            bool is_tame = true;
            for (int w = 0; w < W; ++w) is_tame &= (kQuads == 8 ? side.at(w).most32 : side.at(w).most16) <= kTameMost;
            if (is_tame) return multiply_rows<Way<true>, W>(side, n_rows, next, totals);
        }
        multiply_rows<Way<false>, W>(side, n_rows, next, totals);
    }

    template <class How, int W, class S>
    void multiply_rows(const S& side, int n_rows, const Wanted& next, VectorTotals* totals) const {
        alignas(64) int32_t starts[How::kParts][W][kLanes];
        for (int p = 0; p < How::kParts; ++p) {
            for (int w = 0; w < W; ++w) start_of<How>(side, w, p).store(starts[p][w]);
        }
        constexpr int R = W == kTileVectors ? kBigTileRows : kNarrowTileRows;
        for (int r = 0; r < n_rows; r += R) {
            for (int i = r; i < r + R && i < n_rows; ++i) next.fetch(i);
            multiply_tile<How, R, W>(side, r, starts, totals);
        }
    }

    template <class How, int R, int W, class S>
    PRIMA_NOINLINE void multiply_tile(const S& side, int r0, const int32_t (*starts)[W][kLanes],
                                      VectorTotals* totals) const {
        constexpr int kPart = How::kPart, kSteps = How::kSteps;
        alignas(64) int32_t sums[R][W][kLanes];
        PRIMA_UNROLL
        for (int r = 0; r < R; ++r) {
            PRIMA_UNROLL
            for (int w = 0; w < W; ++w) Ints::zero().store(sums[r][w]);
        }
        for (int p = 0; p < How::kParts; ++p) {
            Ints part[R][W];
            PRIMA_UNROLL
            for (int w = 0; w < W; ++w) {
                const Ints start = Ints::load(starts[p][w]);
                PRIMA_UNROLL
                for (int r = 0; r < R; ++r) part[r][w] = start;
            }
            PRIMA_UNROLL
            for (int k = 0; k < kSteps; ++k) {
                Ints xs[W];
                PRIMA_UNROLL
                for (int w = 0; w < W; ++w) xs[w] = side.step(w, p * kSteps + k);
                PRIMA_UNROLL
                for (int r = 0; r < R; ++r) {
                    const Ints four = broadcast4(codes[r0 + r] + 4 * (p * kSteps + k));
                    PRIMA_UNROLL
                    for (int w = 0; w < W; ++w) part[r][w] = Code::add_products(part[r][w], four, xs[w]);
                }
            }
            PRIMA_UNROLL
            for (int r = 0; r < R; ++r) {
                const Ints scale = Ints::set(scales[r0 + r][p * kPart / kQuads]);
                PRIMA_UNROLL
                for (int w = 0; w < W; ++w) {
                    const Ints sum = Ints::load(sums[r][w]);
                    (kIsWeighed ? add_pairs(sum, part[r][w], scale) : sum + part[r][w] * scale).store(sums[r][w]);
                }
            }
        }
        PRIMA_UNROLL
        for (int r = 0; r < R; ++r) finish<How, W>(side, r0 + r, sums[r], totals);
    }

    // Sums over a block to terms of a row's totals.
    template <class How, int W, class S>
    void finish(const S& side, int r, const int32_t (*sums)[kLanes], VectorTotals* totals) const {
        Ints sum[W], low[W];
        for (int w = 0; w < W; ++w) sum[w] = Ints::load(sums[w]), low[w] = Ints::zero();
        if constexpr (How::kIsGivenBack || B::kHasMinima) {
            PRIMA_UNROLL
            for (int j = 0; j < B::kGroups / 2; ++j) {
                const Ints back = broadcast4(given_back[r] + 2 * j), minimum = broadcast4(minima[r] + 2 * j);
                for (int w = 0; w < W; ++w) {
                    const X& x = side.at(w);
                    const Ints x_sums = Ints::load((B::kGroups == 8 ? x.sum32[j] : x.sum16[j])[side.lane(w)]);
                    if constexpr (How::kIsGivenBack) sum[w] = add_pairs(sum[w], x_sums, back);
                    if constexpr (B::kHasMinima) low[w] = add_pairs(low[w], x_sums, minimum);
                }
            }
        }
        for (int w = 0; w < W; ++w) {
            Floats term = Floats::set(d[r]) * Floats::of(sum[w]);
            if constexpr (B::kHasMinima) term = term - Floats::set(dmin[r]) * Floats::of(low[w]);
            add_term(totals[w][r], side.at(w).scale + side.lane(w), term);
        }
    }
};

// Up to eight blocks of 32 of each of up to kPanelRowsX86 rows.
//
// Sums start from the bits of the float 1.5 * 2^23, so that they are floats that are as much too large; d * float(sum)
// is then one instruction, d * float - d * 1.5 * 2^23 with one rounding at its end: the second product is exact, for d
// has few digits, as long as it does not overflow. Other blocks, damaged ones mostly, are multiplied plainly.
template <class B>
struct alignas(64) SmallPanel {
    using X = Sixteen8;
    using Code = Coding<B>;
    static constexpr int kBlocks = 8;
    static constexpr int kMagicBits = 0x4b400000;
    static constexpr float kMagic = 12582912.0f;
    // Where products are added up as words, a block has to fit one: codes are centred as in a BigPanel.
    static constexpr bool kIsInWords = !kDotsAnyBytes && !Code::kIsWords;
    static constexpr int kCentre = kIsInWords ? Code::centre_for(8) : Code::kOffset;
    static_assert(!kIsInWords || Code::fits(kCentre, 8), "sums would leave their words");
    static constexpr int kSteps = 8 * Code::kBytes;

    uint8_t codes[kPanelRowsX86][kBlocks][32 * Code::kBytes];
    float d[kPanelRowsX86][kBlocks], less[kPanelRowsX86][kBlocks], dmin[kPanelRowsX86][kBlocks];
    bool is_plain;

    static const X* activations(const Activations& a) { return a.sixteen_8; }

    void unpack(const uint8_t* rows, size_t row_bytes, int n_rows, int n_blocks) {
        __m256 largest = _mm256_setzero_ps();
        for (int r = 0; r < n_rows; ++r) {
            const uint8_t* block = rows + size_t(r) * row_bytes;
            for (int b = 0; b < n_blocks; ++b, block += B::kBytes) {
                Code::store(block, 0, codes[r][b]);
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
    void multiply(const X* x, int first, int64_t n_groups, int n_blocks, int n_rows, const Wanted& next,
                  VectorTotals* totals) const {
        for (int b = 0; b < n_blocks; ++b, x += n_groups) {
            for (int r = b; r < n_rows; r += n_blocks) next.fetch(r);
            const Side<X, W, Code::kIsWords> side(x, first);
            if (is_plain) {
                for (int r = 0; r < n_rows; ++r) multiply_tile<1, W, true>(side, r, b, totals);
            } else {
                constexpr int R = W == kTileVectors ? kSmallTileRows : kNarrowTileRows;
                for (int r = 0; r < n_rows; r += R) multiply_tile<R, W, false>(side, r, b, totals);
            }
        }
    }

    template <int R, int W, bool kIsPlain, class S>
    PRIMA_NOINLINE void multiply_tile(const S& side, int r0, int b, VectorTotals* totals) const {
        Ints sums[R][W], base[W];
        PRIMA_UNROLL
        for (int w = 0; w < W; ++w) {
            base[w] = Ints::set(kMagicBits);
            constexpr int above = kIsInWords ? Code::kOffset - kCentre : kCentre;
            if constexpr (above != 0) base[w] = base[w] - Ints::load(side.at(w).sum + side.lane(w)) * Ints::set(above);
            Ints start = base[w];
            if constexpr (kIsInWords) start = kCentre ? start_words(side, w, 0, 8, kCentre) : Ints::zero();
            PRIMA_UNROLL
            for (int r = 0; r < R; ++r) sums[r][w] = start;
        }
        PRIMA_UNROLL
        for (int k = 0; k < kSteps; ++k) {
            Ints xs[W];
            PRIMA_UNROLL
            for (int w = 0; w < W; ++w) xs[w] = side.step(w, k);
            PRIMA_UNROLL
            for (int r = 0; r < R; ++r) {
                const Ints four = broadcast4(codes[r0 + r][b] + 4 * k);
                PRIMA_UNROLL
                for (int w = 0; w < W; ++w) sums[r][w] = Code::add_products(sums[r][w], four, xs[w]);
            }
        }
        PRIMA_UNROLL
        for (int r = 0; r < R; ++r) {
            const Floats ds = Floats::set(d[r0 + r][b]), lesses = Floats::set(less[r0 + r][b]);
            PRIMA_UNROLL
            for (int w = 0; w < W; ++w) {
                if constexpr (kIsInWords) sums[r][w] = add_pairs(base[w], sums[r][w], Ints::set(0x00010001));
                const Floats shifted = Floats::of_bits(sums[r][w]);
                Floats term = kIsPlain ? ds * (shifted - Floats::set(kMagic)) : multiply_add(ds, shifted, lesses);
                if constexpr (B::kHasMinima) {
                    const Floats x_sum = Floats::of(Ints::load(side.at(w).sum + side.lane(w)));
                    term = term - Floats::set(dmin[r0 + r][b]) * x_sum;
                }
                add_term(totals[w][r0 + r], side.at(w).scale + side.lane(w), term);
            }
        }
    }
};

// A tile's products again and again, with nothing to load: what panels could reach.
uint64_t multiply_registers(int64_t n_products) {
    constexpr int R = kBigTileRows, W = kTileVectors;
    Ints sums[R][W];
    PRIMA_UNROLL
    for (int r = 0; r < R; ++r) {
        PRIMA_UNROLL
        for (int w = 0; w < W; ++w) sums[r][w] = hidden(Ints::zero());  // lest equal sums be made once
    }
    const Ints codes = Ints::set(0x01020304);
    Ints xs[W];
    for (int w = 0; w < W; ++w) xs[w] = hidden(Ints::set(w));
    for (int64_t i = 0; i < n_products / (R * W * kLanes * 4); ++i) {
        PRIMA_UNROLL
        for (int r = 0; r < R; ++r) {
            const Ints own = kDotsAnyBytes ? codes : hidden(codes);  // products apart from sums are made once else
            PRIMA_UNROLL
            for (int w = 0; w < W; ++w) sums[r][w] = dot_bytes(sums[r][w], own, xs[w]);
        }
    }
    Ints all = Ints::zero();
    PRIMA_UNROLL
    for (int r = 0; r < R; ++r) {
        PRIMA_UNROLL
        for (int w = 0; w < W; ++w) all = all + sums[r][w];
    }
    alignas(64) uint32_t lanes[kLanes];
    all.store(lanes);
    return lanes[0];
}

// ---------------------------------------------------------------- panels

// Some weight rows by the activation rows from t0 on, a multiple of 16, at most kWalkVectors * kLanes.
template <class B>
struct Walk {
    using Panel = std::conditional_t<B::kWeights == kKBlock, BigPanel<B>, SmallPanel<B>>;

    Panel panel;
    alignas(64) VectorTotals totals[kWalkVectors];
    const Activations& a;
    int n_rows;
    float* out;
    int64_t out_stride;

    // Rows of the panel that are not there are multiplied along with the others: they are zero.
    Walk(const Activations& a, int n_rows, float* out, int64_t out_stride)
        : panel{}, a(a), n_rows(n_rows), out(out), out_stride(out_stride) {}

    // W vectors from the v-th on by the blocks from b on; the last ones give the result.
    template <int W>
    void add_blocks(int64_t b, int n_here, int64_t t0, int64_t v, const Wanted& next) {
        const bool is_last = b + n_here == a.cols / B::kWeights;
        const int64_t t = t0 + v * kLanes, n = a.n - t < W * kLanes ? a.n - t : W * kLanes, n_groups = sixteens(a.n);
        panel.template multiply<W>(Panel::activations(a) + b * n_groups + t / 16, int(t % 16), n_groups, n_here, n_rows,
                                   t + n == a.n || v + W == kWalkVectors ? next : Wanted{}, totals + v);
        if (!is_last) return;
        for (int w = 0; w < W; ++w) {
            float* to = out + (t + kLanes * w) * out_stride;
            for (int r = 0; r < n_rows; r += kLanes) {
                store_turned(totals[v + w] + r, n_rows - r, n - kLanes * w, to + r, out_stride);
            }
        }
    }

    void run(const uint8_t* rows, size_t row_bytes, int64_t t0) {
        const int64_t n_blocks = a.cols / B::kWeights, left = (a.n - t0 + kLanes - 1) / kLanes;
        const int64_t n = left < kWalkVectors ? left : kWalkVectors;
        std::memset(totals, 0, size_t(n) * sizeof(totals[0]));
        for (int64_t b = 0; b < n_blocks; b += Panel::kBlocks) {
            const int n_here = int(n_blocks - b < Panel::kBlocks ? n_blocks - b : Panel::kBlocks);
            panel.unpack(rows + b * B::kBytes, row_bytes, n_rows, n_here);
            const int64_t left = n_blocks - b - n_here, n_next = left < Panel::kBlocks ? left : Panel::kBlocks;
            const uint8_t* after = rows + (b + n_here) * B::kBytes;
            const Wanted next{left > 0 ? after : nullptr, row_bytes, int(n_next) * B::kBytes};
            int64_t v = 0;
            for (; v + kTileVectors <= n; v += kTileVectors) add_blocks<kTileVectors>(b, n_here, t0, v, next);
            if (kTileVectors > 2 && (n & 2)) add_blocks<2>(b, n_here, t0, v, next), v += 2;
            if (n & 1) add_blocks<1>(b, n_here, t0, v, next);
        }
    }
};

template <class B>
void dot_panel(const uint8_t* rows, size_t row_bytes, int n_rows, const Activations& a, float* out,
               int64_t out_stride) {
    Walk<B> walk(a, n_rows, out, out_stride);
    for (int64_t t0 = 0; t0 < a.n; t0 += kWalkVectors * kLanes) walk.run(rows, row_bytes, t0);
}
