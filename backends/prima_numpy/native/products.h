// How the rows of a matrix are walked: cut into tasks, and each task run by the kernels of its type.
#pragma once

#include <vector>

#include "kernels.h"

namespace prima {

// One matrix [rows, cols] of a product; out is [n, rows].
struct Product {
    const MatrixKernels* kernels;
    const uint8_t* data;
    int64_t rows;
    const float* bias;  // [rows] or null
    float* out;
    const float* added = nullptr;  // [n, rows] or null: out becomes added + product
};

// gate * act(gate) * up for n elements.
using Gating = void (*)(const float* gate, const float* up, int64_t n, float* out);

// A product and the activation rows that it takes; with `up`, whose rows are as many and which needs no `out`: the
// product gated by itself, then multiplied by that.
struct Job {
    Product product;
    const Activations* a;
    const Product* up = nullptr;
    Gating gating = nullptr;
};

// Rows r0..r1 of a job.
struct Task {
    const Job* job;
    int64_t r0, r1;
};

inline size_t row_bytes(const MatrixKernels& type, int64_t cols) {
    return size_t(cols / type.block_weights) * size_t(type.block_bytes);
}

// Whether n activation rows are taken by the panel kernel, not one or a few at a time.
inline bool uses_panel(const MatrixKernels& type, int64_t n) {
    return type.panel != nullptr && n >= type.panel_from;
}

// Weight rows times activation rows.
inline int64_t work_of_row(const Job& job) { return job.a->n * (job.up ? 2 : 1); }
inline int64_t work_of(const Job& job) { return job.product.rows * work_of_row(job); }

// Tasks that get smaller towards the end: a thread that is slower than others, or is held up, is not waited for long.
std::vector<Task> split(const std::vector<Job>& jobs, int n_threads);

void run_task(const Task& task);

}  // namespace prima
