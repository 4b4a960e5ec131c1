// Spreads kernels over a pool: which rows go to which task, and the scratch memory for quantised activations.
// Pointers and sizes are taken as checked (module.cpp does). Any thread may call; calls run one after another.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "pool.h"
#include "products.h"

namespace prima {

// Rows [first, first + n) of x go to matrix `expert` of a stack.
struct Group {
    int64_t expert;
    int64_t first;
    int64_t n;
};

// Of the rows of x before a product, as `Engine::rms_norm`; without a gain none.
struct Norm {
    const float* gain = nullptr;
    float eps = 0.0f;
};

// Rows [first, first + n) of a call stand at positions start.. of a sequence.
struct Sequence {
    uint8_t* k;
    uint8_t* v;
    CacheShape shape;
    int64_t first;
    int64_t n;
    int64_t start;
};

// Below so many elements waking a thread costs more than it brings (10-20 us of work).
constexpr int64_t kSmallWork = 64 * 1024;
// Enough tasks per thread that one slowed by a neighbour is not waited for long, few enough that streams stay long.
constexpr int64_t kTasksPerThread = 6;

// Scratch memory for so many, with any content.
template <class T>
T* grow(std::unique_ptr<T[]>& memory, int64_t& have, int64_t want) {
    if (have < want) {
        memory.reset(new T[size_t(want)]);
        have = want;
    }
    return memory.get();
}

struct AttendingRun;  // some segments of queries that attend together

class Engine {
public:
    Engine(int n_threads, const Table& table) : table_(table), pool_(n_threads) {}

    const char* variant() const { return table_.name; }
    int n_threads() const { return pool_.size(); }
    // Null for a type that is not supported.
    const MatrixKernels* kernels(int type) const;

    // out = norm(x) . matrix^T + bias for matrices that share x [n, cols].
    void linear(const std::vector<Product>& products, const float* x, int64_t n, int64_t cols, const Norm& norm = {});
    // The same for two of as many rows: gate.out = gating(gate's product, up's product). up.out is not looked at.
    void gated_linear(const Product& gate, const Product& up, bool is_gelu, const float* x, int64_t n, int64_t cols,
                      const Norm& norm);
    // The same with stacks of matrices [experts, rows, cols], of which each group of rows, in their order, takes one.
    void linear_experts(const std::vector<Product>& stacks, const std::vector<Group>& groups, const float* x,
                        int64_t cols);
    // Rows `ids` [n] of a matrix with `cols` columns as floats.
    void rows(int type, const uint8_t* data, int64_t cols, const int64_t* ids, int64_t n, float* out);
    void rms_norm(const float* x, const float* gain, int64_t n, int64_t dim, float eps, float* out);
    void rope(float* x, const float* cos, const float* sin, int64_t n, int64_t n_heads, int64_t head_dim, int64_t half,
              bool neox);
    void swiglu(const float* gate, const float* up, int64_t n, float* out);
    void geglu(const float* gate, const float* up, int64_t n, float* out);
    void add(const float* x, const float* y, int64_t n, float* out);
    // Rows of q and out [n_heads, head_dim]. Row i of a sequence attends to those of its positions 0..start + i that
    // the rule lets it see. Sequences have heads of one width.
    void attention(const std::vector<Sequence>& sequences, const float* q, int64_t n_heads, const AttentionRule& rule,
                   float* out);
    // Rows of k and v [n_kv_heads, head_dim] to positions start.. of the sequences.
    void kv_write(const std::vector<Sequence>& sequences, const float* k, const float* v);

    // Reads all bytes in the way the products do (several distant streams, prefetched): how fast memory can be.
    uint64_t read(const uint8_t* data, int64_t n_bytes);
    // Multiplies as panels do, but in registers: how fast they could be. False where the variant cannot say.
    bool multiply(int64_t n_products);

private:
    template <class Work>
    void spread(int64_t n, int64_t cost_each, const Work& work);
    std::vector<Activations> prepare(const std::vector<Product>& products, const std::vector<Group>& groups,
                                     const float* x, int64_t cols, const Norm& norm);
    void run(const std::vector<Job>& jobs);
    void attend_apart(const std::vector<AttendingRun>& runs, const AttentionRule& rule);
    void gated(Gating kernel, const float* gate, const float* up, int64_t n, float* out);

    const Table& table_;
    ThreadPool pool_;
    std::mutex scratch_mutex_;
    std::unique_ptr<BlockK[]> blocks_k_;
    std::unique_ptr<Block8[]> blocks_8_;
    std::unique_ptr<SixteenK[]> sixteens_k_;
    std::unique_ptr<Sixteen8[]> sixteens_8_;
    std::unique_ptr<float[]> normed_, sums_;
    std::unique_ptr<Softmax[]> parts_;
    int64_t n_blocks_k_ = 0, n_blocks_8_ = 0, n_sixteens_k_ = 0, n_sixteens_8_ = 0, n_normed_ = 0, n_sums_ = 0;
    int64_t n_parts_ = 0;
};

}  // namespace prima
