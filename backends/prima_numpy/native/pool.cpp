#include "pool.h"

#include <chrono>

#if defined(__linux__)
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

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

// A thread that sleeps, and is to wake on another core than that of who wakes it. Linux prefers that one where it takes
// cores for strangers to each other (virtual machines, or where they share no cache): it lies idle for milliseconds
// beside two threads that take turns. With 30 ms between the layers of a model these took 1.6 times as long.
// Methods are called with the pool's mutex for sleeping held.
class Sleeper {
public:
#if defined(__linux__)
    void lies_down() { thread_ = pid_t(syscall(SYS_gettid)); }

    // Its cores are asked for only now: somebody may have given it others while it slept.
    void keep_off(int core) {
        if (thread_ == 0 || is_kept_off_ || core < 0 || core >= CPU_SETSIZE) return;
        if (sched_getaffinity(thread_, sizeof cores_, &cores_) != 0) return;  // on machines with more than 1024
        cpu_set_t others = cores_;
        CPU_CLR(size_t(core), &others);
        is_kept_off_ = CPU_COUNT(&others) > 0 && sched_setaffinity(thread_, sizeof others, &others) == 0;
    }

    void gets_up() {
        if (is_kept_off_) sched_setaffinity(0, sizeof cores_, &cores_);
        thread_ = 0;
        is_kept_off_ = false;
    }

    static int this_core() { return sched_getcpu(); }

private:
    pid_t thread_ = 0;  // 0: awake
    cpu_set_t cores_;
    bool is_kept_off_ = false;
#else
    void lies_down() {}
    void keep_off(int) {}
    void gets_up() {}
    static int this_core() { return -1; }
#endif
};

ThreadPool::ThreadPool(int n_threads) : sleepers_(new Sleeper[size_t(n_threads - 1)]) {
    threads_.reserve(size_t(n_threads - 1));
    try {
        for (int i = 1; i < n_threads; ++i) threads_.emplace_back([this, i] { serve(sleepers_[size_t(i - 1)]); });
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
    if (n_sleeping_ > 0) wake();
    take_tasks();
    ++job_;  // closes; a thread that comes now sees it, one that came before is seen in n_active_
    watch([&] { return n_active_ == 0; }, [](Clock::duration) { return true; });
}

void ThreadPool::wake() {
    {
        std::lock_guard<std::mutex> lock(sleep_mutex_);
        for (size_t i = 0; i < threads_.size(); ++i) sleepers_[i].keep_off(Sleeper::this_core());
    }
    wake_.notify_all();
}

void ThreadPool::take_tasks() {
    is_at_task = true;
    for (int64_t i = next_++; i < n_tasks_; i = next_++) call_(work_, i);
    is_at_task = false;
}

void ThreadPool::serve(Sleeper& self) {
    uint64_t seen = 0;
    while (!stops_) {
        await_job(seen, self);
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
void ThreadPool::await_job(uint64_t seen, Sleeper& self) {
    const auto is_due = [&] {
        const uint64_t job = job_;
        return stops_ || (job % 2 == 1 && job != seen);
    };
    if (watch(is_due, [](Clock::duration waited) { return waited < kYield; })) return;
    std::unique_lock<std::mutex> lock(sleep_mutex_);
    ++n_sleeping_;
    while (!is_due()) {  // the job may be over before this thread is awake
        self.lies_down();
        wake_.wait(lock);
        self.gets_up();
    }
    --n_sleeping_;
}

}  // namespace prima
