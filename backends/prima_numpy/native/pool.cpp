#include "pool.h"

#include <chrono>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#elif defined(_M_ARM64)
#include <intrin.h>
#endif

namespace prima {

namespace {

// How long a thread looks for work without letting others run: for the small operations between two products.
constexpr auto kSpin = std::chrono::microseconds(20);
// How long it then gives its core to whoever wants it, but does not sleep: on a virtual machine products that began 60 us
// after the last, with sleeping threads, took some 35 us longer than those that began at once. Nodes that share the
// cores get them meanwhile.
constexpr auto kYield = std::chrono::microseconds(500);

inline void relax() {
#if defined(__x86_64__) || defined(_M_X64)
    _mm_pause();
#elif defined(__aarch64__) && (defined(__GNUC__) || defined(__clang__))
    __asm__ __volatile__("yield");
#elif defined(_M_ARM64)
    __yield();
#endif
}

// Whether this thread is at a task of some pool: jobs that a task begins are done by itself.
thread_local bool is_at_task = false;

using Clock = std::chrono::steady_clock;

// Waits for is_due() as long as goes_on(time waited); says whether it came.
template <class Due, class GoesOn>
bool watch(const Due& is_due, const GoesOn& goes_on) {
    const auto start = Clock::now();
    for (auto waited = Clock::duration::zero(); goes_on(waited); waited = Clock::now() - start) {
        for (int i = 0; i < 32; ++i) {
            if (is_due()) return true;
            relax();
        }
        if (waited > kSpin) std::this_thread::yield();
    }
    return false;
}

}  // namespace

ThreadPool::ThreadPool(int n_threads) {
    threads_.reserve(size_t(n_threads - 1));
    try {
        for (int i = 1; i < n_threads; ++i) threads_.emplace_back([this] { serve(); });
    } catch (...) {  // the system gives no more threads
        stop();
        throw;
    }
}

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::stop() {
    {
        std::lock_guard<std::mutex> lock(sleep_mutex_);
        stops_ = true;
    }
    wake_.notify_all();
    for (auto& thread : threads_) thread.join();
}

void ThreadPool::run(int64_t n_tasks, Call call, const void* work) {
    if (threads_.empty() || n_tasks <= 1 || is_at_task) {
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
    watch([&] { return n_active_ == 0; }, [](Clock::duration) { return true; });
}

void ThreadPool::take_tasks() {
    is_at_task = true;
    for (int64_t i = next_++; i < n_tasks_; i = next_++) call_(work_, i);
    is_at_task = false;
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
    if (watch(is_due, [](Clock::duration waited) { return waited < kYield; })) return;
    std::unique_lock<std::mutex> lock(sleep_mutex_);
    ++n_sleeping_;
    wake_.wait(lock, is_due);
    --n_sleeping_;
}

}  // namespace prima
