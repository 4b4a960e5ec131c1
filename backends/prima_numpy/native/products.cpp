#include "products.h"

#include <algorithm>

namespace prima {

namespace {

// How many of n activation rows are taken at once.
int together(const MatrixKernels& kernels, int64_t n) {
    int count = int(std::min<int64_t>(n, kTogether));
    while (kernels.rows[count - 1] == nullptr) --count;
    return count;
}

// Four rows at once from distant quarters of r0..r1: four streams keep more reads in flight than one, which was 1.6
// times the bytes per second.
void run_rows(const MatrixKernels& kernels, const Product& p, size_t bytes, int64_t r0, int64_t r1,
              const Activations& a) {
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
                for (int k = 0; k < 4; ++k) p.out[t * p.rows + index[k]] = out[4 * i + k];
            }
        }
    }
}

void run_panels(const MatrixKernels& kernels, const Product& p, size_t bytes, int64_t r0, int64_t r1,
                const Activations& a) {
    for (int64_t r = r0; r < r1; r += kernels.panel_rows) {
        const int n_rows = int(std::min<int64_t>(kernels.panel_rows, r1 - r));
        kernels.panel(p.data + size_t(r) * bytes, bytes, n_rows, a, p.out + r, p.rows);
    }
}

// A task is this part of a thread's share of what is left, but not less than that part of its share of all.
constexpr int64_t kShare = 4, kLeastShare = 32;

void multiply(const Product& p, const Activations& a, int64_t r0, int64_t r1) {
    (uses_panel(*p.kernels, a.n) ? run_panels : run_rows)(*p.kernels, p, row_bytes(*p.kernels, a.cols), r0, r1, a);
    for (int64_t t = 0; p.bias != nullptr && t < a.n; ++t) {
        for (int64_t r = r0; r < r1; ++r) p.out[t * p.rows + r] += p.bias[r];
    }
    for (int64_t t = 0; p.added != nullptr && t < a.n; ++t) {
        for (int64_t i = t * p.rows + r0; i < t * p.rows + r1; ++i) p.out[i] += p.added[i];
    }
}

}  // namespace

void run_task(const Task& task) {
    const Job& job = *task.job;
    multiply(job.product, *job.a, task.r0, task.r1);
    if (job.up == nullptr) return;
    multiply(*job.up, *job.a, task.r0, task.r1);
    for (int64_t t = 0; t < job.a->n; ++t) {
        float* gate = job.product.out + t * job.product.rows + task.r0;
        job.gating(gate, job.up->out + t * job.product.rows + task.r0, task.r1 - task.r0, gate);
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
