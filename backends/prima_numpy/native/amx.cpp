// AVX-512 with AMX's int8 tiles: Sapphire Rapids and later. As avx512vbmi.cpp, but for panels of quantised types.

#include <immintrin.h>
#include <math.h>
#include <cstring>
#include <type_traits>

#ifdef PRIMA_EMULATE_TILES
#include <cstdio>
#include <cstdlib>
#endif

#include "codebooks.h"
#include "kernels.h"

namespace prima {
namespace amx {
namespace {

#include "half.h"
#include "lanes_avx512.h"
#include "generic.inl"
#include "bytes_x86.h"
#include "blocks.inl"
#include "transpose_avx512.h"
#include "tiles.h"
#include "panel_amx.inl"

template <class B>
struct Quantised {
    static constexpr MatrixKernels kernels() {
        MatrixKernels k;
        k.panel = dot_panel<B>;
        return k;
    }
};

Table make_amx_table() {
    Table table = avx512vbmi_table();
    table.name = "amx";
    table.multiply = nullptr;
    const Matrices tiled = all_matrices<Quantised>();
    for (int type = 0; type < kTypes; ++type) {
        MatrixKernels& kernels = table.matrices.of[type];
        if (kernels.block_weights <= 1) continue;
        kernels.panel = tiled.of[type].panel;
        kernels.panel_from = kPanelFrom;
        kernels.panel_rows = kWide;
    }
    return table;
}

}  // namespace
}  // namespace amx

const Table& amx_table() {
    static const Table table = amx::make_amx_table();
    return table;
}

}  // namespace prima
