// What a CPU variant offers: a table of plain functions on pointers and sizes. Nothing here allocates, throws or locks.
//
// Every variant gives the same bits. Products with quantised weights are exact integers per block, and what is float is
// written as single multiplications and additions in a stated order, never contracted to FMA (see CMakeLists.txt):
//   blocks     y += x_scale * (d * float(isum) - dmin * float(imin)), block by block from the left; the second product
//              is there for types with minima only. A block of activations is as long as one of the weights: 256 or 32.
//   floats     16 partial sums, the l-th over columns l, l + 16, ...; then halves are added: 8, 4, 2, 1
// `prima_numpy/quant.py` does the same in numpy.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(_MSC_VER) && !defined(__clang__)
#pragma fp_contract(off)  // for ARM64 it is on in older versions
#endif

namespace prima {

// Numbers as in the GGUF file.
enum class Type : int {
    F32 = 0, F16 = 1, Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q2_K = 10, Q3_K = 11, Q4_K = 12, Q5_K = 13,
    Q6_K = 14, IQ2_XXS = 16, IQ2_XS = 17, IQ3_XXS = 18, IQ1_S = 19, IQ4_NL = 20, IQ3_S = 21, IQ2_S = 22, IQ4_XS = 23,
    IQ1_M = 29, BF16 = 30, MXFP4 = 39
};
constexpr int kTypes = 40;

constexpr int kKBlock = 256;
constexpr int kQ8Block = 32;
constexpr int kPanelRows = 16;

// 256 activations: q * scale, with sums of q per 16 and per 32.
struct alignas(64) BlockK {
    int8_t q[kKBlock];
    int8_t turned[4][2][32];  // [j][half][i]: q[8 i + 4 half + j]; set by variants whose kernels read it
    int16_t sum16[16];
    int16_t sum32[8];
    float scale;
};

// 32 activations, with the sum of q.
struct Block8 {
    int8_t q[kQ8Block];
    float scale;
    int32_t sum;
};

// Blocks of 16 activation rows side by side, for panels with activation rows in the lanes: [.. / 4][row][4]; rows that
// are not there are zeros. Sums are in pairs: sum8[j][row] are those of q of 16 j .. + 7 and 16 j + 8 .. + 15.
struct alignas(64) SixteenK {
    int8_t q[kKBlock / 4][16][4];
    int16_t sum8[16][16][2];
    int16_t sum16[8][16][2];
    int16_t sum32[4][16][2];
    float scale[16];
    int32_t most16, most32;  // largest sum of magnitudes of q of a row's 16 or 32 from a multiple of that on
};
struct alignas(64) Sixteen8 {
    int8_t q[kQ8Block / 4][16][4];
    int32_t sum[16];
    float scale[16];
};
inline int64_t sixteens(int64_t n) { return (n + 15) / 16; }

// n rows of `cols` activations in the forms that the weights at hand need; others are null.
// Blocks lie as [block][row], so that a tile of rows reads one run of memory per block.
struct Activations {
    const float* x = nullptr;
    const BlockK* k = nullptr;
    const Block8* q8 = nullptr;
    const SixteenK* sixteen_k = nullptr;  // [block][rows / 16], for panels of variants with `join_k`
    const Sixteen8* sixteen_8 = nullptr;
    int64_t n = 0;
    int64_t cols = 0;
};

// Four weight rows by one or more consecutive activation rows from `t` on, as many as its place in
// `MatrixKernels::rows` says: out[4 * i + r] is of activation row t + i.
using DotRows = void (*)(const uint8_t* const rows[4], const Activations& a, int64_t t, float* out);

// Up to `panel_rows` consecutive weight rows by all activation rows: out[t * out_stride + r].
using DotPanel = void (*)(const uint8_t* rows, size_t row_bytes, int n_rows, const Activations& a, float* out,
                          int64_t out_stride);

// The weights of a row of a matrix: `dequantize` of prima_numpy/quant.py, bit for bit.
using RowWeights = void (*)(const uint8_t* row, int64_t cols, float* out);

constexpr int kTogether = 4;  // activation rows that `rows` takes at once, at most

struct MatrixKernels {
    DotRows rows[kTogether] = {};  // [i]: for i + 1 activation rows; null where fewer at a time are as fast
    DotPanel panel = nullptr;  // null: `rows` for each activation row
    int panel_from = 0;        // smallest n for which the panel pays
    int block_weights = 0;     // 1: floats, else 32 or 256
    int block_bytes = 0;
    int panel_rows = kPanelRows;
    RowWeights weights = nullptr;  // the portable variant's alone, which all use: it is for a row or so a token
};

// By the number of the type; without `rows[0]` where a type is not supported.
struct Matrices {
    MatrixKernels of[kTypes];
};

// What K and V are kept in. Q8_0: blocks of 32 as in a GGUF file.
enum class KvType { F32, F16, Q8_0 };
constexpr int kQ8Bytes = 34;  // of a block of Q8_0: d f16, 32 int8

// [n_kv_heads, capacity] rows of head_dim values, each in row_bytes bytes: K or V of one layer and sequence.
struct CacheShape {
    KvType type = KvType::F16;
    int64_t n_kv_heads = 0;
    int64_t capacity = 0;
    int64_t head_dim = 0;
    int64_t row_bytes = 0;
};

struct Cache {
    const uint8_t* k = nullptr;
    const uint8_t* v = nullptr;
    CacheShape shape;
};

// `AttentionRule` of prima_core/arch/ops.py. softcap 0: none; window 0: all positions so far.
struct AttentionRule {
    float scale = 1.0f;
    float softcap = 0.0f;
    int64_t window = 0;
};

// Attention goes by segments of so many positions, counted from 0, and takes so many queries at once at most.
constexpr int64_t kSegment = 256;
constexpr int64_t kQueries = 32;

// Consecutive rows of a sequence, the first at `position`, and the heads of one group, or a part of it: at most
// kQueries.
struct Queries {
    const float* q = nullptr;  // of the first row and head
    int64_t row_stride = 0;    // floats from row to row
    int64_t n_rows = 0;
    int64_t n_heads = 0;
    int64_t kv_head = 0;
    int64_t position = 0;
};

// The largest score so far, and the sum of weights e^(score - top).
struct Softmax {
    float top, sum;
};

struct Table {
    const char* name;
    Matrices matrices;
    // Activation rows t0..t1 of a.n.
    void (*quantize_k)(const Activations& a, int64_t t0, int64_t t1, BlockK* out);
    void (*quantize_8)(const Activations& a, int64_t t0, int64_t t1, Block8* out);
    void (*rms_norm)(const float* x, const float* gain, int64_t n, int64_t dim, float eps, float* out);
    void (*rope)(float* x, const float* cos, const float* sin, int64_t n_heads, int64_t head_dim, int64_t half,
                 bool neox);  // one row
    void (*swiglu)(const float* gate, const float* up, int64_t n, float* out);
    void (*geglu)(const float* gate, const float* up, int64_t n, float* out);
    void (*add)(const float* x, const float* y, int64_t n, float* out);
    // Attention by all segments that the rows may see: s0..s1. With `parts`, each segment's apart, to be merged:
    // sums [segments, n_rows, out_stride] to `out`, and to `parts` [segments, n_rows * n_heads].
    void (*attend)(const Queries& queries, const Cache& cache, const AttentionRule& rule, int64_t s0, int64_t s1,
                   float* out, int64_t out_stride, Softmax* parts);
    // A query's result from n segments computed apart: sums [n, dim] and parts [n], `stride` queries apart.
    void (*merge)(const float* sums, const Softmax* parts, int64_t n, int64_t stride, int64_t dim, float* out);
    // x [n] as a row of K or V.
    void (*store_row)(KvType type, const float* x, int64_t n, uint8_t* out);
    // Reads lines of 64 bytes in the way dot_rows does, four distant streams; the sum is there to be used.
    uint64_t (*read)(const uint8_t* data, int64_t n_lines);
    // One block of columns of n <= 16 rows, `stride` floats apart, quantised and put side by side; null where no panel
    // wants that, else all do.
    void (*join_k)(const float* x, int64_t stride, int64_t n, SixteenK* out) = nullptr;
    void (*join_8)(const float* x, int64_t stride, int64_t n, Sixteen8* out) = nullptr;
    // Multiplies about so many codes by activations as panels do, in registers alone; the sum is there to be used. Null
    // where panels multiply in another way.
    uint64_t (*multiply)(int64_t n_products) = nullptr;
};

const Table& portable_table();
#ifdef PRIMA_X86
const Table& avx2_table();
#ifdef PRIMA_AVXVNNI
const Table& avxvnni_table();
#endif
const Table& avx512vnni_table();
const Table& avx512vbmi_table();
#ifdef PRIMA_AMX
const Table& amx_table();
#endif
#endif
#ifdef PRIMA_NEON
const Table& neon_table();
const Table& neon_dotprod_table();  // with PRIMA_NEON_DOTPROD: where the compiler knows the instructions
const Table& neon_i8mm_table();     // with PRIMA_NEON_I8MM
#endif

}  // namespace prima
