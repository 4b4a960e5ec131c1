// AVX-512 with VNNI, VBMI, VBMI2, BITALG and GFNI: Ice Lake and Zen 4, and later. As avx512vnni.cpp, but for what gains
// from looking up bytes in registers.

#include "kernels.h"

namespace prima {

const Table& avx512vbmi_table() {
    static const Table table = [] {
        Table t = avx512vnni_table();
        t.name = "avx512vbmi";
        return t;
    }();
    return table;
}

}  // namespace prima
