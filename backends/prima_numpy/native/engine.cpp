#include "engine.h"

#include <algorithm>
#include <atomic>

namespace prima {

namespace {

// Below so many elements, or products of a matrix, waking a thread costs more than it brings (10-20 us of work).
constexpr int64_t kSmallWork = 64 * 1024, kSmallProduct = 256 * 1024;
// Enough tasks per thread that one slowed by a neighbour is not waited for long, few enough that streams stay long.
constexpr int64_t kTasksPerThread = 6;

template <class T>
T* grow(std::unique_ptr<T[]>& blocks, int64_t& have, int64_t want) {
    if (have < want) {
        blocks.reset(new T[size_t(want)]);
        have = want;
    }
    return blocks.get();
}

}  // namespace

const MatrixKernels* Engine::kernels(int type) const {
    if (type < 0 || type >= kTypes) return nullptr;
    const MatrixKernels* kernels = &table_.matrices.of[type];
    return kernels->rows[0] != nullptr ? kernels : nullptr;
}

// work(begin, end) over 0..n in pieces; `cost_each` in elements.
template <class Work>
void Engine::spread(int64_t n, int64_t cost_each, const Work& work) {
    if (n * cost_each < kSmallWork || pool_.size() == 1) {
        if (n > 0) work(int64_t(0), n);
        return;
    }
    const int64_t n_tasks = std::min(n, pool_.size() * kTasksPerThread);
    pool_.run(n_tasks, [&](int64_t i) { work(n * i / n_tasks, n * (i + 1) / n_tasks); });
}

// The activation rows of each group, normed, in the forms that the products need.
std::vector<Activations> Engine::prepare(const std::vector<Product>& products, const std::vector<Group>& groups,
                                         const float* x, int64_t n, int64_t cols, const Norm& norm) {
    bool needs_k = false, needs_8 = false;
    for (const Product& p : products) {
        needs_k |= p.kernels->block_weights == kKBlock;
        needs_8 |= p.kernels->block_weights == kQ8Block;
    }
    const int64_t k_blocks = cols / kKBlock, q8_blocks = cols / kQ8Block;
    BlockK* k = needs_k ? grow(blocks_k_, n_blocks_k_, n * k_blocks) : nullptr;
    Block8* q8 = needs_8 ? grow(blocks_8_, n_blocks_8_, n * q8_blocks) : nullptr;
    float* normed = norm.gain ? grow(normed_, n_normed_, n * cols) : nullptr;
    const float* rows = normed ? normed : x;
    std::vector<Activations> inputs;
    inputs.reserve(groups.size());
    for (const Group& g : groups) {
        inputs.push_back({rows + g.first * cols, k ? k + g.first * k_blocks : nullptr,
                          q8 ? q8 + g.first * q8_blocks : nullptr, g.n, cols});
    }
    if (!needs_k && !needs_8 && !normed) return inputs;
    spread(n, cols, [&](int64_t t0, int64_t t1) {
        if (normed) table_.rms_norm(x + t0 * cols, norm.gain, t1 - t0, cols, norm.eps, normed + t0 * cols);
        for (size_t i = 0; i < groups.size(); ++i) {
            const Group& g = groups[i];
            const int64_t from = std::max(t0 - g.first, int64_t(0)), to = std::min(t1 - g.first, g.n);
            if (from >= to) continue;
            if (needs_k) table_.quantize_k(inputs[i], from, to, k + g.first * k_blocks);
            if (needs_8) table_.quantize_8(inputs[i], from, to, q8 + g.first * q8_blocks);
        }
    });
    return inputs;
}

void Engine::run(const std::vector<Job>& jobs) {
    int64_t n_products = 0;
    for (const Job& job : jobs) n_products += work_of(job) * job.a->cols;
    if (pool_.size() == 1 || n_products < kSmallProduct) {
        for (const Job& job : jobs) run_task({&job, 0, job.product.rows});
        return;
    }
    const std::vector<Task> tasks = split(jobs, pool_.size());
    pool_.run(int64_t(tasks.size()), [&](int64_t i) { run_task(tasks[size_t(i)]); });
}

void Engine::linear(const std::vector<Product>& products, const float* x, int64_t n, int64_t cols, const Norm& norm) {
    if (n == 0) return;
    std::lock_guard<std::mutex> lock(scratch_mutex_);
    const std::vector<Activations> inputs = prepare(products, {{0, 0, n}}, x, n, cols, norm);
    std::vector<Job> jobs;
    jobs.reserve(products.size());
    for (const Product& p : products) jobs.push_back({p, &inputs[0]});
    run(jobs);
}

void Engine::gated_linear(const Product& gate, const Product& up, bool is_gelu, const float* x, int64_t n,
                          int64_t cols, const Norm& norm) {
    if (n == 0) return;
    std::lock_guard<std::mutex> lock(scratch_mutex_);
    const std::vector<Activations> inputs = prepare({gate, up}, {{0, 0, n}}, x, n, cols, norm);
    run({{gate, &inputs[0], &up, is_gelu ? table_.geglu : table_.swiglu}});
}

void Engine::linear_experts(const std::vector<Product>& stacks, const std::vector<Group>& groups, const float* x,
                            int64_t n, int64_t cols) {
    std::lock_guard<std::mutex> lock(scratch_mutex_);
    const std::vector<Activations> inputs = prepare(stacks, groups, x, n, cols, {});
    std::vector<Job> jobs;
    jobs.reserve(stacks.size() * groups.size());
    for (size_t i = 0; i < groups.size(); ++i) {
        if (groups[i].n == 0) continue;
        for (const Product& stack : stacks) {
            Product p = stack;
            p.data += size_t(groups[i].expert * stack.rows) * row_bytes(*stack.kernels, cols);
            p.out += groups[i].first * stack.rows;
            jobs.push_back({p, &inputs[i]});
        }
    }
    run(jobs);
}

uint64_t Engine::read(const uint8_t* data, int64_t n_bytes) {
    constexpr int64_t piece = 1 << 20;
    std::atomic<uint64_t> total{0};
    const int64_t n_pieces = (n_bytes + piece - 1) / piece;
    pool_.run(n_pieces, [&](int64_t i) {
        const int64_t start = i * piece;
        total += table_.read(data + start, std::min(piece, n_bytes - start) / 64);
    });
    return total;
}

void Engine::rms_norm(const float* x, const float* gain, int64_t n, int64_t dim, float eps, float* out) {
    spread(n, dim,
           [&](int64_t t0, int64_t t1) { table_.rms_norm(x + t0 * dim, gain, t1 - t0, dim, eps, out + t0 * dim); });
}

void Engine::rope(float* x, const float* cos, const float* sin, int64_t n, int64_t n_heads, int64_t head_dim,
                  int64_t half, bool neox) {
    spread(n, n_heads * half * 2, [&](int64_t t0, int64_t t1) {
        for (int64_t t = t0; t < t1; ++t) {
            table_.rope(x + t * n_heads * head_dim, cos + t * half, sin + t * half, n_heads, head_dim, half, neox);
        }
    });
}

void Engine::gated(Gating kernel, const float* gate, const float* up, int64_t n, float* out) {
    constexpr int64_t piece = 1024;
    spread((n + piece - 1) / piece, 8 * piece, [&](int64_t p0, int64_t p1) {
        const int64_t i0 = p0 * piece, i1 = std::min(n, p1 * piece);
        kernel(gate + i0, up + i0, i1 - i0, out + i0);
    });
}

void Engine::swiglu(const float* gate, const float* up, int64_t n, float* out) { gated(table_.swiglu, gate, up, n, out); }

void Engine::geglu(const float* gate, const float* up, int64_t n, float* out) { gated(table_.geglu, gate, up, n, out); }

void Engine::add(const float* x, const float* y, int64_t n, float* out) {
    constexpr int64_t piece = 4096;
    spread((n + piece - 1) / piece, piece, [&](int64_t p0, int64_t p1) {
        const int64_t i0 = p0 * piece, i1 = std::min(n, p1 * piece);
        table_.add(x + i0, y + i0, i1 - i0, out + i0);
    });
}

void Engine::attention(const float* q, const Cache& cache, int64_t n, int64_t n_heads, int64_t start,
                       const AttentionRule& rule, float* out) {
    const int64_t n_kv_heads = cache.shape.n_kv_heads, head_dim = cache.shape.head_dim;
    const int64_t group = n_heads / n_kv_heads;
    const int64_t n_seen = rule.window > 0 ? std::min(rule.window, start + n) : start + n;
    // Head by head, so that neighbouring tasks read the same K and V.
    spread(n * n_kv_heads, n_seen * group * head_dim, [&](int64_t i0, int64_t i1) {
        for (int64_t i = i0; i < i1; ++i) {
            const int64_t kv_head = i / n, row = i % n;
            const int64_t offset = (row * n_heads + kv_head * group) * head_dim;
            table_.attend(q + offset, cache, kv_head, group, start + row + 1, rule, out + offset);
        }
    });
}

void Engine::kv_write(const float* k, int64_t n, int64_t start, const CacheShape& shape, uint8_t* cache) {
    const int64_t n_kv_heads = shape.n_kv_heads, head_dim = shape.head_dim;
    spread(n, n_kv_heads * head_dim, [&](int64_t t0, int64_t t1) {
        for (int64_t t = t0; t < t1; ++t) {
            for (int64_t h = 0; h < n_kv_heads; ++h) {
                uint8_t* row = cache + (h * shape.capacity + start + t) * shape.row_bytes;
                table_.store_row(shape.type, k + (t * n_kv_heads + h) * head_dim, head_dim, row);
            }
        }
    });
}

}  // namespace prima
