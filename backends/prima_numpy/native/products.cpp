#include "products.h"

#include <algorithm>
#include <memory>

namespace prima {

namespace {

// How many of n activation rows are taken at once.
int together(const MatrixKernels& kernels, int64_t n) {
    int count = int(std::min<int64_t>(n, kTogether));
    while (kernels.rows[count - 1] == nullptr) --count;
    return count;
}

// Where the products of a run of rows go: [n, ..], `stride` floats from one activation row to the next.
struct Target {
    float* out;
    int64_t stride;
};

// Four rows at once from distant quarters of r0..r1: four streams keep more reads in flight than one, which was 1.6
// times the bytes per second.
void run_rows(const MatrixKernels& kernels, const Product& p, size_t bytes, int64_t r0, int64_t r1,
              const Activations& a, const Target& to) {
    const int64_t quarter = (r1 - r0 + 3) / 4;
    for (int64_t i = 0; i < quarter; ++i) {
        int64_t index[4];
        const uint8_t* rows[4];
        for (int k = 0; k < 4; ++k) {
            index[k] = std::min(r0 + k * quarter + i, r1 - 1);  // past the end: the last row again
            rows[k] = p.data + size_t(index[k]) * bytes;
        }
        for (int64_t t = 0; t < a.n;) {
            float out[4 * kTogether];
            const int n = together(kernels, a.n - t);
            kernels.rows[n - 1](rows, a, t, out);
            for (int i = 0; i < n; ++i, ++t) {
                for (int k = 0; k < 4; ++k) to.out[t * to.stride + index[k] - r0] = out[4 * i + k];
            }
        }
    }
}

void run_panels(const MatrixKernels& kernels, const Product& p, size_t bytes, int64_t r0, int64_t r1,
                const Activations& a, const Target& to) {
    for (int64_t r = r0; r < r1; r += kernels.panel_rows) {
        const int n_rows = int(std::min<int64_t>(kernels.panel_rows, r1 - r));
        kernels.panel(p.data + size_t(r) * bytes, bytes, n_rows, a, to.out + (r - r0), to.stride);
    }
}

// A task is this part of a thread's share of what is left, but not less than that part of its share of all.
constexpr int64_t kShare = 4, kLeastShare = 32;

Target target_of(const Product& p, int64_t r0) { return {p.out + r0, p.rows}; }

void multiply(const Product& p, const Activations& a, int64_t r0, int64_t r1, const Target& to) {
    const auto run = uses_panel(*p.kernels, a.n) ? run_panels : run_rows;
    run(*p.kernels, p, row_bytes(*p.kernels, a.cols), r0, r1, a, to);
    for (int64_t t = 0; p.bias != nullptr && t < a.n; ++t) {
        for (int64_t r = r0; r < r1; ++r) to.out[t * to.stride + r - r0] += p.bias[r];
    }
    for (int64_t t = 0; p.added != nullptr && t < a.n; ++t) {
        for (int64_t r = r0; r < r1; ++r) to.out[t * to.stride + r - r0] += p.added[t * p.rows + r];
    }
}

// What gates go with is needed for a moment only: so many rows of it that they stay in the cache.
void multiply_gated(const Job& job, int64_t r0, int64_t r1) {
    const Activations& a = *job.a;
    const int64_t together = uses_panel(*job.product.kernels, a.n) ? job.product.kernels->panel_rows : r1 - r0;
    const std::unique_ptr<float[]> ups(new float[size_t(a.n * std::min(together, r1 - r0))]);
    for (int64_t r = r0; r < r1; r += together) {
        const int64_t n = std::min(together, r1 - r);
        const Target gates = target_of(job.product, r);
        multiply(job.product, a, r, r + n, gates);
        multiply(*job.up, a, r, r + n, {ups.get(), n});
        for (int64_t t = 0; t < a.n; ++t) {
            float* gate = gates.out + t * gates.stride;
            job.gating(gate, ups.get() + t * n, n, gate);
        }
    }
}

}  // namespace

void run_task(const Task& task) {
    const Job& job = *task.job;
    if (job.up != nullptr) {
        multiply_gated(job, task.r0, task.r1);
    } else {
        multiply(job.product, *job.a, task.r0, task.r1, target_of(job.product, task.r0));
    }
}

std::vector<Task> split(const std::vector<Job>& jobs, int n_threads) {
    int64_t left = 0;
    for (const Job& job : jobs) left += work_of(job);
    const int64_t least = left / (n_threads * kLeastShare);
    std::vector<Task> tasks;
    for (const Job& job : jobs) {
        const int64_t all = job.product.rows;
        const MatrixKernels& kernels = *job.product.kernels;
        const bool is_panel = uses_panel(kernels, job.a->n);
        for (int64_t r = 0; r < all;) {
            int64_t own = std::max(left / (n_threads * kShare), least) / work_of_row(job);
            // Panels take long enough to be tasks one by one, where there are enough for all threads.
            if (is_panel && own > kernels.panel_rows) own = kernels.panel_rows - kPanelRows;
            const int64_t rows = std::min(own / kPanelRows * kPanelRows + kPanelRows, all - r);
            tasks.push_back({&job, r, r + rows});
            r += rows;
            left -= rows * work_of_row(job);
        }
    }
    return tasks;
}

}  // namespace prima
