// AVX-512 with VNNI, VBMI, VBMI2, BITALG and GFNI: Ice Lake and Zen 4, and later. As avx512vnni.cpp, but for what gains
// from looking up bytes in registers.

#include <immintrin.h>
#include <cstring>

#include "codebooks.h"
#include "kernels.h"

namespace prima {
namespace avx512vbmi {
namespace {

#include "half.h"
#include "codebooks_vbmi.inl"

// Rows are so fast that four at a time beat a panel for longer (measured: bench/kernels.py).
template <class B>
void set_rows(Table& table, Type type, int panel_from = 12) {
    MatrixKernels& kernels = table.matrices.of[int(type)];
    kernels.rows[0] = dot_codebook_rows<B, 1>;
    kernels.rows[1] = dot_codebook_rows<B, 2>;
    kernels.rows[2] = dot_codebook_rows<B, 3>;
    kernels.rows[3] = dot_codebook_rows<B, 4>;
    kernels.panel_from = panel_from;
}

void quantize_and_turn(const Activations& a, int64_t t0, int64_t t1, BlockK* out) {
    avx512vnni_table().quantize_k(a, t0, t1, out);
    for (int64_t b = 0; b < a.cols / kKBlock; ++b) {
        for (int64_t t = t0; t < t1; ++t) turn(out[b * a.n + t]);
    }
}

Table make_table() {
    Table table = avx512vnni_table();
    table.name = "avx512vbmi";
    table.quantize_k = quantize_and_turn;
    set_rows<Iq1S>(table, Type::IQ1_S, 9);
    set_rows<Iq1M>(table, Type::IQ1_M);
    set_rows<Iq2Xxs>(table, Type::IQ2_XXS);
    set_rows<Iq2Xs>(table, Type::IQ2_XS);
    set_rows<Iq2S>(table, Type::IQ2_S);
    set_rows<Iq3Xxs>(table, Type::IQ3_XXS);
    set_rows<Iq3S>(table, Type::IQ3_S);
    return table;
}

}  // namespace
}  // namespace avx512vbmi

const Table& avx512vbmi_table() {
    static const Table table = avx512vbmi::make_table();
    return table;
}

}  // namespace prima
