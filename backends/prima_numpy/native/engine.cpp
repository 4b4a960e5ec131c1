#include "engine.h"

#include <algorithm>
#include <atomic>

namespace prima {

namespace {

// kSmallWork in products of a matrix.
constexpr int64_t kSmallProduct = 256 * 1024;

// How many rows, and groups of 16 side by side, of n activation rows the products with blocks of `block` need.
struct Need {
    int64_t rows = 0, sixteens = 0;

    Need() = default;
    Need(const std::vector<Product>& products, int block, bool joins, int64_t n) {
        for (const Product& p : products) {
            if (p.kernels->block_weights != block) continue;
            if (joins && uses_panel(*p.kernels, n)) {
                sixteens = prima::sixteens(n);
            } else {
                rows = n;
            }
        }
    }
    void operator+=(const Need& other) {
        rows += other.rows;
        sixteens += other.sixteens;
    }
};

// Where quantised activations go; null: not needed.
struct Blocks {
    BlockK* k;
    Block8* q8;
    SixteenK* sixteen_k;
    Sixteen8* sixteen_8;
};

// Rows from..to of a, at most 16, of which `from` is a multiple of.
void quantize(const Table& table, const Activations& a, const Blocks& out, int64_t from, int64_t to) {
    if (out.k != nullptr) table.quantize_k(a, from, to, out.k);
    if (out.q8 != nullptr) table.quantize_8(a, from, to, out.q8);
    const float* x = a.x + from * a.cols;
    const int64_t n_groups = sixteens(a.n), group = from / 16;
    for (int64_t b = 0; out.sixteen_k != nullptr && b < a.cols / kKBlock; ++b) {
        table.join_k(x + b * kKBlock, a.cols, to - from, out.sixteen_k + b * n_groups + group);
    }
    for (int64_t b = 0; out.sixteen_8 != nullptr && b < a.cols / kQ8Block; ++b) {
        table.join_8(x + b * kQ8Block, a.cols, to - from, out.sixteen_8 + b * n_groups + group);
    }
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
                                         const float* x, int64_t cols, const Norm& norm) {
    const int64_t k_blocks = cols / kKBlock, q8_blocks = cols / kQ8Block;
    Need all_k, all_8;
    for (const Group& g : groups) {
        all_k += Need(products, kKBlock, table_.join_k != nullptr, g.n);
        all_8 += Need(products, kQ8Block, table_.join_8 != nullptr, g.n);
    }
    Blocks next = {grow(blocks_k_, n_blocks_k_, all_k.rows * k_blocks),
                   grow(blocks_8_, n_blocks_8_, all_8.rows * q8_blocks),
                   grow(sixteens_k_, n_sixteens_k_, all_k.sixteens * k_blocks),
                   grow(sixteens_8_, n_sixteens_8_, all_8.sixteens * q8_blocks)};

    const int64_t n = groups.empty() ? 0 : groups.back().first + groups.back().n;
    float* normed = norm.gain ? grow(normed_, n_normed_, n * cols) : nullptr;
    const float* rows = normed ? normed : x;
    struct Piece {  // up to 16 rows of one group
        size_t group;
        int64_t from, to;
    };
    std::vector<Piece> pieces;
    std::vector<Activations> inputs;
    std::vector<Blocks> blocks;
    for (const Group& g : groups) {
        for (int64_t t = 0; t < g.n; t += 16) pieces.push_back({inputs.size(), t, std::min(t + 16, g.n)});
        const Need k(products, kKBlock, table_.join_k != nullptr, g.n);
        const Need q8(products, kQ8Block, table_.join_8 != nullptr, g.n);
        blocks.push_back({k.rows ? next.k : nullptr, q8.rows ? next.q8 : nullptr,
                          k.sixteens ? next.sixteen_k : nullptr, q8.sixteens ? next.sixteen_8 : nullptr});
        const Blocks& own = blocks.back();
        inputs.push_back({rows + g.first * cols, own.k, own.q8, own.sixteen_k, own.sixteen_8, g.n, cols});
        next = {next.k + k.rows * k_blocks, next.q8 + q8.rows * q8_blocks, next.sixteen_k + k.sixteens * k_blocks,
                next.sixteen_8 + q8.sixteens * q8_blocks};
    }
    if (!normed && all_k.rows + all_k.sixteens + all_8.rows + all_8.sixteens == 0) return inputs;
    spread(int64_t(pieces.size()), (pieces[0].to - pieces[0].from) * cols, [&](int64_t p0, int64_t p1) {
        for (int64_t i = p0; i < p1; ++i) {
            const Piece& piece = pieces[size_t(i)];
            const int64_t first = (groups[piece.group].first + piece.from) * cols;
            if (normed) table_.rms_norm(x + first, norm.gain, piece.to - piece.from, cols, norm.eps, normed + first);
            quantize(table_, inputs[piece.group], blocks[piece.group], piece.from, piece.to);
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
    const std::vector<Activations> inputs = prepare(products, {{0, 0, n}}, x, cols, norm);
    std::vector<Job> jobs;
    jobs.reserve(products.size());
    for (const Product& p : products) jobs.push_back({p, &inputs[0]});
    run(jobs);
}

void Engine::gated_linear(const Product& gate, const Product& up, bool is_gelu, const float* x, int64_t n,
                          int64_t cols, const Norm& norm) {
    if (n == 0) return;
    std::lock_guard<std::mutex> lock(scratch_mutex_);
    const std::vector<Activations> inputs = prepare({gate, up}, {{0, 0, n}}, x, cols, norm);
    run({{gate, &inputs[0], &up, is_gelu ? table_.geglu : table_.swiglu}});
}

void Engine::linear_experts(const std::vector<Product>& stacks, const std::vector<Group>& groups, const float* x,
                            int64_t cols) {
    std::lock_guard<std::mutex> lock(scratch_mutex_);
    const std::vector<Activations> inputs = prepare(stacks, groups, x, cols, {});
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

bool Engine::multiply(int64_t n_products) {
    if (table_.multiply == nullptr) return false;
    constexpr int64_t piece = 1 << 24;
    std::atomic<uint64_t> total{0};
    pool_.run((n_products + piece - 1) / piece,
              [&](int64_t i) { total += table_.multiply(std::min(piece, n_products - i * piece)); });
    return true;
}

void Engine::rows(int type, const uint8_t* data, int64_t cols, const int64_t* ids, int64_t n, float* out) {
    const MatrixKernels& kernels = portable_table().matrices.of[type];
    const size_t bytes = row_bytes(kernels, cols);
    spread(n, 4 * cols, [&](int64_t t0, int64_t t1) {  // 1 to 5 us for 2048 weights
        for (int64_t t = t0; t < t1; ++t) kernels.weights(data + size_t(ids[t]) * bytes, cols, out + t * cols);
    });
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

void Engine::kv_write(const std::vector<Sequence>& sequences, const float* k, const float* v) {
    for (const Sequence& s : sequences) {
        const int64_t n_heads = s.shape.n_kv_heads, dim = s.shape.head_dim;
        spread(s.n, 2 * n_heads * dim, [&](int64_t t0, int64_t t1) {
            for (int64_t i = t0 * n_heads; i < t1 * n_heads; ++i) {
                const int64_t from = (s.first * n_heads + i) * dim;
                const int64_t to = (i % n_heads * s.shape.capacity + s.start + i / n_heads) * s.shape.row_bytes;
                table_.store_row(s.shape.type, k + from, dim, s.k + to);
                table_.store_row(s.shape.type, v + from, dim, s.v + to);
            }
        });
    }
}

}  // namespace prima
