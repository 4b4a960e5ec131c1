// What the engine does for attention: which queries go together, and segments apart where those are too few.

#include <algorithm>

#include "engine.h"

namespace prima {

// Queries that attend together to the segments that they may see.
struct Attending {
    Queries queries;
    Cache cache;
    int64_t s0, s1;
    float* out;
    int64_t out_stride;

    int64_t n_queries() const { return queries.n_rows * queries.n_heads; }
    int64_t n_parts() const { return (s1 - s0) * n_queries(); }
};

struct AttendingRun {
    const Attending* of;
    int64_t s0, s1;
    int64_t part;  // in all parts, one for each query and segment
};

namespace {

// In blocks of rows for each K/V head, head by head: neighbouring tasks read the same K and V.
void add_attending(const Sequence& s, const float* q, int64_t n_heads, const AttentionRule& rule, float* out,
                   std::vector<Attending>& all) {
    const int64_t dim = s.shape.head_dim, row_size = n_heads * dim, group = n_heads / s.shape.n_kv_heads;
    const int64_t rows_together = std::max(int64_t(1), kQueries / group);
    for (int64_t head = 0; head < n_heads;) {
        const int64_t kv_head = head / group, n = std::min(kQueries, (kv_head + 1) * group - head);
        for (int64_t row = 0; row < s.n; row += rows_together) {
            const int64_t n_rows = std::min(rows_together, s.n - row), position = s.start + row;
            const int64_t offset = (s.first + row) * row_size + head * dim;
            const int64_t unseen = rule.window > 0 ? std::max(int64_t(0), position + 1 - rule.window) : 0;
            all.push_back({{q + offset, row_size, n_rows, n, kv_head, position},
                           {s.k, s.v, s.shape},
                           unseen / kSegment,
                           (position + n_rows - 1) / kSegment + 1,
                           out + offset,
                           row_size});
        }
        head += n;
    }
}

// About so many runs of segments; those of the same queries one after the other.
std::vector<AttendingRun> cut(const std::vector<Attending>& all, int64_t n_runs) {
    int64_t n_segments = 0, part = 0;
    for (const Attending& a : all) n_segments += a.s1 - a.s0;
    const int64_t length = std::max(int64_t(1), n_segments / n_runs);
    std::vector<AttendingRun> runs;
    for (const Attending& a : all) {
        for (int64_t s = a.s0; s < a.s1; s += length) {
            const int64_t end = std::min(a.s1, s + length);
            runs.push_back({&a, s, end, part});
            part += (end - s) * a.n_queries();
        }
    }
    return runs;
}

void merge(const Table& table, const Attending& a, const float* sums, const Softmax* parts) {
    const int64_t dim = a.cache.shape.head_dim, n = a.n_queries(), n_heads = a.queries.n_heads;
    for (int64_t i = 0; i < n; ++i) {
        float* out = a.out + i / n_heads * a.out_stride + i % n_heads * dim;
        table.merge(sums + i * dim, parts + i, a.s1 - a.s0, n, dim, out);
    }
}

}  // namespace

void Engine::attention(const std::vector<Sequence>& sequences, const float* q, int64_t n_heads,
                       const AttentionRule& rule, float* out) {
    std::vector<Attending> all;
    for (const Sequence& s : sequences) add_attending(s, q, n_heads, rule, out, all);
    int64_t work = 0;
    for (const Attending& a : all) work += a.n_parts() * kSegment * a.cache.shape.head_dim;
    const auto attend = [&](int64_t i) {
        const Attending& a = all[size_t(i)];
        table_.attend(a.queries, a.cache, rule, a.s0, a.s1, a.out, a.out_stride, nullptr);
    };
    const int64_t n = int64_t(all.size()), n_tasks = pool_.size() * kTasksPerThread;
    if (pool_.size() == 1 || work < kSmallWork) {
        for (int64_t i = 0; i < n; ++i) attend(i);
    } else if (n >= n_tasks) {
        pool_.run(n, attend);
    } else {
        attend_apart(cut(all, n_tasks), rule);
    }
}

// Too few for all threads: segments apart, then merged.
void Engine::attend_apart(const std::vector<AttendingRun>& runs, const AttentionRule& rule) {
    const AttendingRun& last = runs.back();
    const int64_t dim = last.of->cache.shape.head_dim;
    const int64_t n_parts = last.part + (last.s1 - last.s0) * last.of->n_queries();
    std::lock_guard<std::mutex> lock(scratch_mutex_);
    float* sums = grow(sums_, n_sums_, n_parts * dim);
    Softmax* parts = grow(parts_, n_parts_, n_parts);
    pool_.run(int64_t(runs.size()), [&](int64_t i) {
        const AttendingRun& r = runs[size_t(i)];
        const Queries& queries = r.of->queries;
        table_.attend(queries, r.of->cache, rule, r.s0, r.s1, sums + r.part * dim, queries.n_heads * dim,
                      parts + r.part);
    });
    const auto merge_from = [&](int64_t i) {
        const AttendingRun& r = runs[size_t(i)];
        if (r.s0 == r.of->s0) merge(table_, *r.of, sums + r.part * dim, parts + r.part);
    };
    if (n_parts * dim < kSmallWork) {
        for (size_t i = 0; i < runs.size(); ++i) merge_from(int64_t(i));
    } else {
        pool_.run(int64_t(runs.size()), merge_from);
    }
}

}  // namespace prima
