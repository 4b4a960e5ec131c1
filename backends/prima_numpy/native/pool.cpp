#include "pool.h"

#include <chrono>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#elif defined(_M_ARM64)
#include <intrin.h>
#endif

namespace prima {

namespace {

// Long enough to bridge Python between two products of a token, short enough not to steal from a neighbour's process.
constexpr auto kSpin = std::chrono::microseconds(30);

inline void relax() {
#if defined(__x86_64__) || defined(_M_X64)
    _mm_pause();
#elif defined(__aarch64__) && (defined(__GNUC__) || defined(__clang__))
    __asm__ __volatile__("yield");
#elif defined(_M_ARM64)
    __yield();
#endif
}

}  // namespace

ThreadPool::ThreadPool(int n_threads) {
    threads_.reserve(size_t(n_threads - 1));
    for (int i = 1; i < n_threads; ++i) threads_.emplace_back([this] { serve(); });
}

ThreadPool::~ThreadPool() {
    {
        std::lock_guard<std::mutex> lock(sleep_mutex_);
        stops_ = true;
    }
    wake_.notify_all();
    for (auto& thread : threads_) thread.join();
}

void ThreadPool::run(int64_t n_tasks, Call call, const void* work) {
    if (threads_.empty() || n_tasks <= 1) {
        for (int64_t i = 0; i < n_tasks; ++i) call(work, i);
        return;
    }
    std::lock_guard<std::mutex> lock(run_mutex_);
    call_ = call;
    work_ = work;
    n_tasks_ = n_tasks;
    next_ = 0;
    ++job_;  // opens; a thread about to sleep either sees this or is seen in n_sleeping_
    if (n_sleeping_ > 0) {
        {
            std::lock_guard<std::mutex> sleep_lock(sleep_mutex_);
        }
        wake_.notify_all();
    }
    take_tasks();
    ++job_;  // closes; a thread that comes now sees it, one that came before is seen in n_active_
    for (int i = 0; n_active_ > 0; ++i) {
        if (i < 4096) {
            relax();
        } else {
            std::this_thread::yield();
        }
    }
}

void ThreadPool::take_tasks() {
    for (int64_t i = next_++; i < n_tasks_; i = next_++) call_(work_, i);
}

void ThreadPool::serve() {
    uint64_t seen = 0;
    while (!stops_) {
        await_job(seen);
        ++n_active_;
        const uint64_t job = job_;
        if (job % 2 == 1) {
            take_tasks();
            seen = job;
        }
        --n_active_;
    }
}

// Returns when a job other than `seen` is open, or the pool stops.
void ThreadPool::await_job(uint64_t seen) {
    const auto is_due = [&] {
        const uint64_t job = job_;
        return stops_ || (job % 2 == 1 && job != seen);
    };
    const auto deadline = std::chrono::steady_clock::now() + kSpin;
    do {
        for (int i = 0; i < 32; ++i) {
            if (is_due()) return;
            relax();
        }
    } while (std::chrono::steady_clock::now() < deadline);
    std::unique_lock<std::mutex> lock(sleep_mutex_);
    ++n_sleeping_;
    wake_.wait(lock, is_due);
    --n_sleeping_;
}

}  // namespace prima
