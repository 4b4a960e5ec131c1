// Products of 32 weight rows with many activation rows by tile instructions. Included inside variant amx's namespace.
//
// Tile A is 16 weight rows as they lie, taken apart to bytes; tile B is 16 activation rows turned (SixteenK,
// Sixteen8); tile C has a weight row's sums in each row, so that d and the minima are one broadcast per row.
//
// A tile instruction takes its 16 cycles however few columns it adds, and weighing sums of 16 or 32 columns would take
// longer than making them. So the scales of K and IQ types are multiplied into the codes: a product of code and scale
// is a word at most, whose two bytes are two tiles. All 256 columns are added up by the tiles then, and
//   sum = 256 * (high bytes . x) + low bytes . x
// One tile is enough where the product fits a byte.

constexpr int kTileRows = 16;
constexpr int kWide = 2 * kTileRows;  // weight rows of a panel: two tiles of them share a tile of activations
constexpr int kChunk = 256;           // columns that a panel holds
constexpr int kStrip = 32;            // tiles of activations that are taken per unpacked panel: totals of 64 KiB
// Fewer rows are as well served by `rows`: those are four at a time, and a panel costs the same for 1 as for 16.
constexpr int kPanelFrom = kTogether + 1;

using Sums = int32_t[4][kTileRows][16];     // [tile][weight row][activation row]
using Totals = float (*)[kWide][kTileRows];  // [tile of activations][weight row][activation row]

inline __m512i load512(const void* p) { return _mm512_loadu_si512(p); }
inline __m512i pair_at(const int16_t* p) { return _mm512_set1_epi32(int32_t(load_u32((const uint8_t*)p))); }

constexpr TileConfig tile_config(int columns) {
    TileConfig config;
    for (int t = 0; t < 4; ++t) config.set(t, kTileRows, 64);
    for (int t = 4; t < 6; ++t) config.set(t, kTileRows, columns);
    for (int t = 6; t < 8; ++t) config.set(t, columns / 4, 64);
    return config;
}

// ---------------------------------------------------------------- blocks of 256

// What is multiplied into one byte instead of two: codes up to 3 by scales up to 15; code - 4 by -32 .. 31, negated,
// for -4 * -32 is 128.
template <class B>
constexpr bool kFitsByte = std::is_same_v<B, Q2_K> || std::is_same_v<B, Q3_K>;
template <class B>
constexpr bool kIsNegated = std::is_same_v<B, Q3_K>;

template <class B>
struct alignas(64) BigTiles {
    static constexpr TileConfig kConfig = tile_config(64);

    uint8_t low[kWide][kChunk];
    uint8_t high[kFitsByte<B> ? 1 : kWide][kChunk];
    float d[kWide], dmin[kWide];
    alignas(32) int16_t minima[kWide][16];

    // The scale of each word's group, for columns 64 c .. + 63; even and odd columns share a word.
    static __m512i scales_of(__m512i scales, int c) {
        if constexpr (B::kGroups == 8) {
            const __m512i first = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(1), 1);
            return _mm512_permutexvar_epi16(_mm512_add_epi16(first, _mm512_set1_epi16(short(2 * c))), scales);
        } else {
            const __m512i first = _mm512_setr_epi64(0, 0, 0x0001000100010001, 0x0001000100010001,  //
                                                    0x0002000200020002, 0x0002000200020002,        //
                                                    0x0003000300030003, 0x0003000300030003);
            return _mm512_permutexvar_epi16(_mm512_add_epi16(first, _mm512_set1_epi16(short(4 * c))), scales);
        }
    }

    // Codes, without their offset, times scales: those of even and of odd columns.
    static void products(__m512i codes, __m512i scales, __m512i& even, __m512i& odd) {
        if constexpr (B::kIsSigned) {
            even = _mm512_mullo_epi16(_mm512_srai_epi16(_mm512_slli_epi16(codes, 8), 8), scales);
            odd = _mm512_mullo_epi16(_mm512_srai_epi16(codes, 8), scales);
        } else {
            even = _mm512_maddubs_epi16(codes, _mm512_and_si512(scales, _mm512_set1_epi16(255)));
            odd = _mm512_maddubs_epi16(codes, _mm512_slli_epi16(scales, 8));
        }
        if constexpr (B::kOffset != 0) {
            const __m512i offset = _mm512_mullo_epi16(scales, _mm512_set1_epi16(B::kOffset));
            even = kIsNegated<B> ? _mm512_sub_epi16(offset, even) : _mm512_sub_epi16(even, offset);
            odd = kIsNegated<B> ? _mm512_sub_epi16(offset, odd) : _mm512_sub_epi16(odd, offset);
        }
    }

    void unpack_row(const uint8_t* block, int r) {
        alignas(32) int16_t words[16];
        B::scales(block, words, minima[r]);
        // Half by half, as they were stored: a load that spans two stores waits for both.
        __m256i both = _mm256_castsi128_si256(_mm_load_si128((const __m128i*)words));
        if constexpr (B::kGroups == 16) {
            both = _mm256_inserti128_si256(both, _mm_load_si128((const __m128i*)(words + 8)), 1);
        }
        const __m512i scales = _mm512_castsi256_si512(both);
        const __mmask64 odds = 0xaaaaaaaaaaaaaaaa;
        PRIMA_UNROLL
        for (int c = 0; c < 4; ++c) {
            const __m512i first = _mm512_castsi256_si512(B::codes(block, 2 * c).v);
            __m512i even, odd;
            products(_mm512_inserti64x4(first, B::codes(block, 2 * c + 1).v, 1), scales_of(scales, c), even, odd);
            _mm512_store_si512(low[r] + 64 * c, _mm512_mask_blend_epi8(odds, even, _mm512_slli_epi16(odd, 8)));
            if constexpr (!kFitsByte<B>) {
                _mm512_store_si512(high[r] + 64 * c, _mm512_mask_blend_epi8(odds, _mm512_srli_epi16(even, 8), odd));
            }
        }
        d[r] = B::d(block);
        if constexpr (B::kHasMinima) dmin[r] = B::dmin(block);
    }

    void unpack(const uint8_t* const rows[kWide], int64_t c, int64_t) {
        for (int r = 0; r < kWide; ++r) {
            const uint8_t* block = rows[r] + c / kKBlock * B::kBytes;
            for (int i = 0; i < B::kBytes; i += 64) prefetch(block + kPrefetchBytes + i);
            unpack_row(block, r);
        }
    }

    // To tiles 0 to 3: two for the first 16 weight rows, two for the others. Four in flight hide how long one takes.
    void multiply(const SixteenK& x) const {
        TILE_ZERO(0);
        TILE_ZERO(1);
        TILE_ZERO(2);
        TILE_ZERO(3);
        if constexpr (kFitsByte<B>) {  // even and odd runs of 64 columns
            for (int c = 0; c < kChunk; c += 128) {
                TILE_LOAD(6, x.q[c / 4], 64);
                TILE_LOAD(4, low[0] + c, kChunk);
                TILE_DOT_SS(0, 4, 6);
                TILE_LOAD(5, low[kTileRows] + c, kChunk);
                TILE_DOT_SS(2, 5, 6);
                TILE_LOAD(7, x.q[c / 4 + 16], 64);
                TILE_LOAD(4, low[0] + c + 64, kChunk);
                TILE_DOT_SS(1, 4, 7);
                TILE_LOAD(5, low[kTileRows] + c + 64, kChunk);
                TILE_DOT_SS(3, 5, 7);
            }
        } else {  // low and high bytes
            for (int c = 0; c < kChunk; c += 64) {
                TILE_LOAD(6, x.q[c / 4], 64);
                TILE_LOAD(4, low[0] + c, kChunk);
                TILE_DOT_US(0, 4, 6);
                TILE_LOAD(5, high[0] + c, kChunk);
                TILE_DOT_SS(1, 5, 6);
                TILE_LOAD(4, low[kTileRows] + c, kChunk);
                TILE_DOT_US(2, 4, 6);
                TILE_LOAD(5, high[kTileRows] + c, kChunk);
                TILE_DOT_SS(3, 5, 6);
            }
        }
    }

    static __m512i whole_sum(const Sums& sums, int r) {
        const __m512i a = load512(sums[r / kTileRows * 2][r % kTileRows]);
        const __m512i b = load512(sums[r / kTileRows * 2 + 1][r % kTileRows]);
        if constexpr (kIsNegated<B>) return _mm512_sub_epi32(_mm512_sub_epi32(_mm512_setzero_si512(), a), b);
        if constexpr (kFitsByte<B>) return _mm512_add_epi32(a, b);
        return _mm512_add_epi32(a, _mm512_slli_epi32(b, 8));
    }

    void finish(const SixteenK& x, const Sums& sums, float (*totals)[kTileRows]) const {
        constexpr int kPairs = B::kGroups / 2;
        __m512i x_sums[kPairs];
        if constexpr (B::kHasMinima) {
            for (int j = 0; j < kPairs; ++j) x_sums[j] = load512(B::kGroups == 8 ? x.sum32[j] : x.sum16[j]);
        }
        const __m512 scale = _mm512_load_ps(x.scale);
        for (int r = 0; r < kWide; ++r) {
            __m512 term = _mm512_mul_ps(_mm512_set1_ps(d[r]), _mm512_cvtepi32_ps(whole_sum(sums, r)));
            if constexpr (B::kHasMinima) {
                __m512i low_sum = _mm512_setzero_si512();
                PRIMA_UNROLL
                for (int j = 0; j < kPairs; ++j) {
                    low_sum = _mm512_dpwssd_epi32(low_sum, x_sums[j], pair_at(minima[r] + 2 * j));
                }
                term = _mm512_sub_ps(term, _mm512_mul_ps(_mm512_set1_ps(dmin[r]), _mm512_cvtepi32_ps(low_sum)));
            }
            _mm512_store_ps(totals[r], _mm512_add_ps(_mm512_load_ps(totals[r]), _mm512_mul_ps(scale, term)));
        }
    }

    // The tiles of one activation tile are worked on while the sums of the one before are weighed.
    void add_to(const Activations& a, int64_t c, int64_t, int64_t first, int64_t count, Totals totals) const {
        const SixteenK* x = a.sixteen_k + c / kKBlock * sixteens(a.n) + first;
        alignas(64) Sums sums;
        for (int64_t t = 0; t < count; ++t) {
            multiply(x[t]);
            if (t > 0) finish(x[t - 1], sums, totals[t - 1]);
            TILE_STORE(0, sums[0], 64);
            TILE_STORE(1, sums[1], 64);
            TILE_STORE(2, sums[2], 64);
            TILE_STORE(3, sums[3], 64);
        }
        finish(x[count - 1], sums, totals[count - 1]);
    }
};

// ---------------------------------------------------------------- blocks of 32

// Up to eight blocks of each row. Codes are signed, their offset taken off. Four blocks of 16 weight rows and 16
// activation rows are in flight at once, a tile each: every one has a d and a scale of its own.
template <class B>
struct alignas(64) SmallTiles {
    static constexpr TileConfig kConfig = tile_config(kQ8Block);
    static constexpr int kBlocks = kChunk / kQ8Block;

    uint8_t codes[kWide][kChunk];
    float d[kWide][kBlocks], dmin[kWide][kBlocks];

    void unpack(const uint8_t* const rows[kWide], int64_t c, int64_t columns) {
        for (int r = 0; r < kWide; ++r) {
            const uint8_t* block = rows[r] + c / kQ8Block * B::kBytes;
            for (int i = 0; i < kBlocks * B::kBytes; i += 64) prefetch(block + kPrefetchBytes + i);
            for (int j = 0; j < columns / kQ8Block; ++j, block += B::kBytes) {
                const __m256i offset = _mm256_set1_epi8(B::kOffset);
                _mm256_store_si256((__m256i*)(codes[r] + kQ8Block * j), _mm256_sub_epi8(B::codes(block, 0).v, offset));
                d[r][j] = B::d(block);
                if constexpr (B::kHasMinima) dmin[r][j] = B::dmin(block);
            }
        }
    }

    // `n` blocks from the j-th on, of 16 weight rows from `row` on; x[i * stride] goes with the i-th of them.
    struct Unit {
        int row, j, n;
        const Sixteen8* x;
        int64_t stride;
        float (*totals)[kTileRows];
    };

    void multiply(const Unit& u) const {
        const uint8_t* weights = codes[u.row] + kQ8Block * u.j;
#define PRIMA_DOT(i, a, b)                                  \
    if (i < u.n) {                                          \
        TILE_ZERO(i);                                       \
        TILE_LOAD(a, weights + kQ8Block * i, kChunk);       \
        TILE_LOAD(b, u.x[i * u.stride].q, 64);              \
        TILE_DOT_SS(i, a, b);                               \
    }
        PRIMA_DOT(0, 4, 6)
        PRIMA_DOT(1, 5, 7)
        PRIMA_DOT(2, 4, 6)
        PRIMA_DOT(3, 5, 7)
#undef PRIMA_DOT
    }

    static void store(const Unit& u, Sums& sums) {
        TILE_STORE(0, sums[0], 64);
        if (u.n > 1) TILE_STORE(1, sums[1], 64);
        if (u.n > 2) TILE_STORE(2, sums[2], 64);
        if (u.n > 3) TILE_STORE(3, sums[3], 64);
    }

    template <int N>
    void finish(const Unit& u, const Sums& sums) const {
        __m512 scale[N], x_sum[N];
        for (int i = 0; i < N; ++i) {
            scale[i] = _mm512_load_ps(u.x[i * u.stride].scale);
            if constexpr (B::kHasMinima) x_sum[i] = _mm512_cvtepi32_ps(load512(u.x[i * u.stride].sum));
        }
        for (int r = 0; r < kTileRows; ++r) {
            const float* row_d = d[u.row + r] + u.j;
            const float* row_dmin = dmin[u.row + r] + u.j;
            __m512 total = _mm512_load_ps(u.totals[r]);
            for (int i = 0; i < N; ++i) {
                __m512 term = _mm512_mul_ps(_mm512_set1_ps(row_d[i]), _mm512_cvtepi32_ps(load512(sums[i][r])));
                if constexpr (B::kHasMinima) {
                    term = _mm512_sub_ps(term, _mm512_mul_ps(_mm512_set1_ps(row_dmin[i]), x_sum[i]));
                }
                total = _mm512_add_ps(total, _mm512_mul_ps(scale[i], term));
            }
            _mm512_store_ps(u.totals[r], total);
        }
    }

    void finish(const Unit& u, const Sums& sums) const {
        if (u.n == 4) return finish<4>(u, sums);
        if (u.n == 3) return finish<3>(u, sums);
        if (u.n == 2) return finish<2>(u, sums);
        finish<1>(u, sums);
    }

    void add_to(const Activations& a, int64_t c, int64_t columns, int64_t first, int64_t count, Totals totals) const {
        const int64_t stride = sixteens(a.n);
        const Sixteen8* x = a.sixteen_8 + c / kQ8Block * stride + first;
        const int n_blocks = int(columns / kQ8Block);
        alignas(64) Sums sums;
        Unit before{};
        for (int64_t t = 0; t < count; ++t) {
            for (int row = 0; row < kWide; row += kTileRows) {
                for (int j = 0; j < n_blocks; j += 4) {
                    const int n = n_blocks - j < 4 ? n_blocks - j : 4;
                    const Unit u{row, j, n, x + t + j * stride, stride, totals[t] + row};
                    multiply(u);
                    if (before.n > 0) finish(before, sums);
                    store(u, sums);
                    before = u;
                }
            }
        }
        finish(before, sums);
    }
};

// ---------------------------------------------------------------- the walk over columns and strips of activations

inline void write_totals(const float (*totals)[kTileRows], int n_rows, int64_t n, float* out, int64_t out_stride) {
    for (int row = 0; row < n_rows; row += kTileRows) {
        const int left = n_rows - row;
        const __mmask16 present = left < kTileRows ? __mmask16((1u << left) - 1) : __mmask16(0xffff);
        __m512i v[16];
        for (int r = 0; r < kTileRows; ++r) v[r] = load512(totals[row + r]);
        transpose(v);
        for (int64_t t = 0; t < n; ++t) _mm512_mask_storeu_epi32(out + t * out_stride + row, present, v[t]);
    }
}

template <class B>
void dot_panel(const uint8_t* data, size_t row_bytes, int n_rows, const Activations& a, float* out,
               int64_t out_stride) {
    using Tiles = std::conditional_t<B::kWeights == kKBlock, BigTiles<B>, SmallTiles<B>>;
    const TilesInUse in_use(Tiles::kConfig);
    const uint8_t* rows[kWide];
    for (int r = 0; r < kWide; ++r) rows[r] = data + size_t(r < n_rows ? r : n_rows - 1) * row_bytes;
    Tiles tiles;
    for (int64_t first = 0; first < sixteens(a.n); first += kStrip) {
        const int64_t left = sixteens(a.n) - first, count = left < kStrip ? left : kStrip;
        alignas(64) float totals[kStrip][kWide][kTileRows];
        std::memset(totals, 0, size_t(count) * sizeof(totals[0]));
        for (int64_t c = 0; c < a.cols; c += kChunk) {
            const int64_t columns = a.cols - c < kChunk ? a.cols - c : kChunk;
            tiles.unpack(rows, c, columns);
            tiles.add_to(a, c, columns, first, count, totals);
        }
        for (int64_t t = 0; t < count; ++t) {
            const int64_t row = (first + t) * kTileRows, n = a.n - row < kTileRows ? a.n - row : kTileRows;
            write_totals(totals[t], n_rows, n, out + row * out_stride, out_stride);
        }
    }
}
