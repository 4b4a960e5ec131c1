#define PRIMA_VARIANT avx2
#include "variant_avx2.inl"

const prima::Table& prima::avx2_table() { return avx2::kTable; }
