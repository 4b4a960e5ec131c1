#define PRIMA_VARIANT avxvnni
#define PRIMA_HAS_VNNI
#include "variant_avx2.inl"

const prima::Table& prima::avxvnni_table() { return avxvnni::kTable; }
