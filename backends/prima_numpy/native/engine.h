// Spreads kernels over a pool: which rows go to which task, and the scratch memory for quantised activations.
// Pointers and sizes are taken as checked (module.cpp does). Any thread may call; calls run one after another.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "kernels.h"
#include "pool.h"

namespace prima {

// One matrix [rows, cols] of a product; out is [n, rows].
struct Product {
    const MatrixKernels* kernels;
    const uint8_t* data;
    int64_t rows;
    const float* bias;  // [rows] or null
    float* out;
};

class Engine {
public:
    Engine(int n_threads, const Table& table) : table_(table), pool_(n_threads) {}

    const char* variant() const { return table_.name; }
    int n_threads() const { return pool_.size(); }
    // Null for a type that is not supported.
    const MatrixKernels* kernels(int type) const;

    // out = x . matrix^T + bias for matrices that share x [n, cols].
    void linear(const std::vector<Product>& products, const float* x, int64_t n, int64_t cols);
    void rms_norm(const float* x, const float* gain, int64_t n, int64_t dim, float eps, float* out);
    void rope(float* x, const float* cos, const float* sin, int64_t n, int64_t n_heads, int64_t head_dim, int64_t half,
              bool neox);
    void swiglu(const float* gate, const float* up, int64_t n, float* out);
    void add(const float* x, const float* y, int64_t n, float* out);
    // Row i attends to positions 0..start + i.
    void attention(const float* q, const Cache& cache, int64_t n, int64_t n_heads, int64_t start, float scale,
                   float* out);
    // k [n, n_kv_heads, head_dim] to positions start.. of cache [n_kv_heads, capacity, head_dim].
    void kv_write(const float* k, int64_t n, int64_t start, int64_t n_kv_heads, int64_t capacity, int64_t head_dim,
                  bool is_half, void* cache);

    // Reads all bytes in the way the products do (several distant streams, prefetched): how fast memory can be.
    uint64_t read(const uint8_t* data, int64_t n_bytes);

private:
    template <class Work>
    void spread(int64_t n, int64_t cost_each, const Work& work);
    Activations prepare(const std::vector<Product>& products, const float* x, int64_t n, int64_t cols);

    const Table& table_;
    ThreadPool pool_;
    std::mutex scratch_mutex_;
    std::unique_ptr<BlockK[]> blocks_k_;
    std::unique_ptr<Block8[]> blocks_8_;
    int64_t n_blocks_k_ = 0, n_blocks_8_ = 0;
};

}  // namespace prima
