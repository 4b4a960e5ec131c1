// The tile instructions (AMX, int8): eight registers of up to 16 rows of 64 bytes, configured per thread. With
// PRIMA_EMULATE_TILES they are plain C++ that does what Intel's manual says and ends the program where a CPU would
// fault, so that what is built on them can be tested without such a CPU. Included inside a variant's namespace.
//
//   TILE_LOAD(tile, base, stride)   TILE_STORE(tile, base, stride)   TILE_ZERO(tile)
//   TILE_DOT_SS(sum, a, b)  sum[m][n] += a[m][4 k + i] * b[k][4 n + i] over k and i: bytes, both signed, to int32
//   TILE_DOT_US(sum, a, b)  the same with a unsigned
// The numbers of tiles must be literals: they become part of the instruction.

// What LDTILECFG reads.
struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    constexpr void set(int tile, int n_rows, int n_bytes) {
        rows[tile] = uint8_t(n_rows);
        row_bytes[tile] = uint16_t(n_bytes);
    }
};
static_assert(sizeof(TileConfig) == 64 && offsetof(TileConfig, row_bytes) == 16 && offsetof(TileConfig, rows) == 48,
              "as the CPU reads it");

#ifndef PRIMA_EMULATE_TILES

// GCC's intrinsics do not tell the compiler that they read memory.
#if defined(__GNUC__) || defined(__clang__)
#define PRIMA_TILE_FENCE() __asm__ volatile("" ::: "memory")
#else
#define PRIMA_TILE_FENCE() (void)0
#endif

#define TILE_LOAD(tile, base, stride)       \
    do {                                    \
        PRIMA_TILE_FENCE();                 \
        _tile_loadd(tile, base, stride);    \
    } while (0)
#define TILE_STORE(tile, base, stride) _tile_stored(tile, base, stride)
#define TILE_ZERO(tile) _tile_zero(tile)
#define TILE_DOT_SS(sum, a, b) _tile_dpbssd(sum, a, b)
#define TILE_DOT_US(sum, a, b) _tile_dpbusd(sum, a, b)

inline void load_tile_config(const TileConfig& config) {
    PRIMA_TILE_FENCE();
    _tile_loadconfig(&config);
}
inline void release_tiles() { _tile_release(); }

#else

struct EmulatedTiles {
    TileConfig config;
    uint8_t bytes[8][16][64];

    EmulatedTiles() { config.palette = 0; }

    static void check(bool is_right, const char* what) {
        if (is_right) return;
        std::fprintf(stderr, "a tile instruction would fault: %s\n", what);
        std::abort();
    }
    void check_used(int tile) const {
        check(config.palette == 1, "no configuration");
        check(tile >= 0 && tile < 8 && config.rows[tile] != 0, "a tile that is not configured");
    }

    void configure(const TileConfig& c) {
        check(c.palette == 1 && c.start_row == 0, "palette or start row");
        for (uint8_t byte : c.reserved) check(byte == 0, "reserved bytes");
        for (int t = 0; t < 16; ++t) {
            check(c.rows[t] <= 16 && c.row_bytes[t] <= 64, "a tile's size");
            check((c.rows[t] == 0) == (c.row_bytes[t] == 0), "half a tile's size");
            check(t < 8 || c.rows[t] == 0, "a ninth tile");
        }
        config = c;
        std::memset(bytes, 0, sizeof(bytes));
    }
    void release() { config.palette = 0; }

    void zero(int tile) {
        check_used(tile);
        std::memset(bytes[tile], 0, sizeof(bytes[tile]));
    }
    void load(int tile, const void* base, int64_t stride) {
        zero(tile);
        for (int r = 0; r < config.rows[tile]; ++r) {
            std::memcpy(bytes[tile][r], (const uint8_t*)base + r * stride, config.row_bytes[tile]);
        }
    }
    void store(int tile, void* base, int64_t stride) const {
        check_used(tile);
        for (int r = 0; r < config.rows[tile]; ++r) {
            std::memcpy((uint8_t*)base + r * stride, bytes[tile][r], config.row_bytes[tile]);
        }
    }
    template <class A>
    void dot(int sum, int a, int b) {
        const int tiles[3] = {sum, a, b};
        for (int tile : tiles) {
            check_used(tile);
            check(config.row_bytes[tile] % 4 == 0, "rows that are not int32s");
        }
        check(sum != a && sum != b && a != b, "one tile twice");
        check(config.rows[sum] == config.rows[a] && config.row_bytes[sum] == config.row_bytes[b] &&
                  config.row_bytes[a] / 4 == config.rows[b],
              "tiles that do not fit");
        for (int m = 0; m < config.rows[sum]; ++m) {
            uint32_t row[16];  // sums wrap, as the CPU's do
            std::memcpy(row, bytes[sum][m], 64);
            for (int k = 0; k < config.rows[b]; ++k) {
                for (int n = 0; n < config.row_bytes[sum] / 4; ++n) {
                    for (int i = 0; i < 4; ++i) {
                        row[n] += uint32_t(int32_t(A(bytes[a][m][4 * k + i])) * int8_t(bytes[b][k][4 * n + i]));
                    }
                }
            }
            std::memset(bytes[sum][m], 0, 64);
            std::memcpy(bytes[sum][m], row, config.row_bytes[sum]);
        }
        for (int m = config.rows[sum]; m < 16; ++m) std::memset(bytes[sum][m], 0, 64);
    }
};

thread_local EmulatedTiles emulated;

#define TILE_LOAD(tile, base, stride) emulated.load(tile, base, stride)
#define TILE_STORE(tile, base, stride) emulated.store(tile, base, stride)
#define TILE_ZERO(tile) emulated.zero(tile)
#define TILE_DOT_SS(sum, a, b) emulated.dot<int8_t>(sum, a, b)
#define TILE_DOT_US(sum, a, b) emulated.dot<uint8_t>(sum, a, b)

inline void load_tile_config(const TileConfig& config) { emulated.configure(config); }
inline void release_tiles() { emulated.release(); }

#endif

// Tiles of one configuration for as long as it lives. Released at the end: until then the system saves 8 KiB more at
// every change of threads, and other libraries' tiles would have our shapes.
struct TilesInUse {
    explicit TilesInUse(const TileConfig& config) { load_tile_config(config); }
    ~TilesInUse() { release_tiles(); }
    TilesInUse(const TilesInUse&) = delete;
    TilesInUse& operator=(const TilesInUse&) = delete;
};
