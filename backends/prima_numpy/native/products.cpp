#include "products.h"

#include <algorithm>
#include <cstring>
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

void multiply(const Product& p, const Activations& a, int64_t r0, int64_t r1, const Target& to) {
    const auto run = uses_panel(*p.kernels, a.n) ? run_panels : run_rows;
    run(*p.kernels, p, row_bytes(*p.kernels, a.cols), r0, r1, a, to);
    for (int64_t t = 0; p.bias != nullptr && t < a.n; ++t) {
        for (int64_t r = r0; r < r1; ++r) to.out[t * to.stride + r - r0] += p.bias[r];
    }
}

// The products of rows r0.. of a job, n_rows of them, to where they belong, with what is added to them or gated by them.
void deliver(const Job& job, int64_t r0, int64_t n_rows, const Target& products, const float* ups) {
    const Product& p = job.product;
    for (int64_t t = 0; t < job.a->n; ++t) {
        const float* own = products.out + t * products.stride;
        float* out = p.out + t * p.rows + r0;
        if (ups != nullptr) {
            job.gating(own, ups + t * n_rows, n_rows, out);
        } else if (p.added != nullptr) {
            const float* added = p.added + t * p.rows + r0;
            for (int64_t r = 0; r < n_rows; ++r) out[r] = own[r] + added[r];
        } else if (own != out) {
            std::memcpy(out, own, size_t(n_rows) * sizeof(float));
        }
    }
}

// So many floats, from the beginning of a line on.
class Lines {
public:
    explicit Lines(int64_t n) : memory_(n > 0 ? new float[size_t(n + kLine)] : nullptr) {}
    float* begin() const { return memory_.get() + (0 - uintptr_t(memory_.get()) / sizeof(float)) % kLine; }

private:
    static constexpr int64_t kLine = 64 / sizeof(float);
    std::unique_ptr<float[]> memory_;
};

}  // namespace

// Panels' products, and what gates go with, are first kept where they stay in the cache, some rows at a time: lines of
// the result are far apart, mostly by a power of two, and would be waited for as often as they are looked at.
void run_task(const Task& task) {
    const Job& job = *task.job;
    const Activations& a = *job.a;
    const Product& p = job.product;
    const bool is_panel = uses_panel(*p.kernels, a.n);
    const int64_t together = std::min(is_panel ? p.kernels->panel_rows : task.r1, task.r1 - task.r0);
    const int64_t room = a.n * together, own_room = is_panel ? room : 0;
    const Lines memory(own_room + (job.up ? room : 0));
    float* ups = job.up ? memory.begin() + own_room : nullptr;
    for (int64_t r = task.r0; r < task.r1; r += together) {
        const int64_t n_rows = std::min(together, task.r1 - r);
        const Target products = is_panel ? Target{memory.begin(), n_rows} : Target{p.out + r, p.rows};
        multiply(p, a, r, r + n_rows, products);
        if (ups) multiply(*job.up, a, r, r + n_rows, {ups, n_rows});
        deliver(job, r, n_rows, products, ups);
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
