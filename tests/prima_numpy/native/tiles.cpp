// One emulated tile instruction: what tests/prima_numpy/test_amx.py compares with numpy, and expects to fault.
//
//   tiles whole | part   tiles of all rows and bytes, or of 5 rows of 32 bytes
//                        stdin: a [16][64], b [16][64], c int32 [16][16]; stdout: c + a . b, a signed, then unsigned
//   tiles FAULT          what a CPU refuses
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#define PRIMA_EMULATE_TILES
#include "tiles.h"

namespace {

uint8_t a[16][64], b[16][64];
int32_t c[16][16];

TileConfig shapes(int rows, int columns) {
    TileConfig config;
    config.set(0, rows, 64);
    config.set(1, rows, columns);
    config.set(2, columns / 4, 64);
    return config;
}

void load_all() {
    TILE_LOAD(0, c, 64);
    TILE_LOAD(1, a, 64);
    TILE_LOAD(2, b, 64);
}

void write_sums() {
    int32_t sums[16][16] = {};
    TILE_STORE(0, sums, 64);
    std::fwrite(sums, sizeof(sums), 1, stdout);
}

void multiply(int rows, int columns) {
    const TilesInUse in_use(shapes(rows, columns));
    load_all();
    TILE_DOT_SS(0, 1, 2);
    write_sums();
    load_all();
    TILE_DOT_US(0, 1, 2);
    write_sums();
}

}  // namespace

int main(int, char** argv) {
    const bool has_input = std::fread(a, sizeof(a), 1, stdin) == 1 && std::fread(b, sizeof(b), 1, stdin) == 1 &&
                           std::fread(c, sizeof(c), 1, stdin) == 1;
    TileConfig config = shapes(16, 64);
    if (std::strcmp(argv[1], "whole") == 0 && has_input) {
        multiply(16, 64);
    } else if (std::strcmp(argv[1], "part") == 0 && has_input) {
        multiply(5, 32);
    } else if (std::strcmp(argv[1], "unconfigured") == 0) {
        TILE_ZERO(0);
    } else if (std::strcmp(argv[1], "released") == 0) {
        multiply(16, 64);
        TILE_ZERO(0);
    } else if (std::strcmp(argv[1], "unused") == 0) {
        const TilesInUse in_use(config);
        TILE_ZERO(3);
    } else if (std::strcmp(argv[1], "palette") == 0) {
        config.palette = 2;
        load_tile_config(config);
    } else if (std::strcmp(argv[1], "large") == 0) {
        config.rows[0] = 17;
        load_tile_config(config);
    } else if (std::strcmp(argv[1], "shapes") == 0) {
        config.set(2, 8, 64);
        const TilesInUse in_use(config);
        TILE_DOT_SS(0, 1, 2);
    } else if (std::strcmp(argv[1], "twice") == 0) {
        const TilesInUse in_use(config);
        TILE_DOT_SS(0, 1, 1);
    } else {
        return 2;
    }
    return 0;
}
