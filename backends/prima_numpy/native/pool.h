// A small pool of threads for fork-join work: the caller takes part, chunks are handed out one by one.
//
// Threads stay awake between the products of a token, at the disposal of whoever wants their cores, and then sleep: an
// idle pool costs nothing. One job at a time; a second caller waits. Not safe across fork.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace prima {

class Sleeper;

class ThreadPool {
public:
    // The caller counts as one thread. Throws std::system_error where the system does not give that many.
    explicit ThreadPool(int n_threads);
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    int size() const { return int(threads_.size()) + 1; }

    // Calls work(0) ... work(n_tasks - 1), each once, on any thread; returns when all are done. `work` must not throw.
    template <class Work>
    void run(int64_t n_tasks, const Work& work) {
        run(n_tasks, [](const void* w, int64_t task) { (*static_cast<const Work*>(w))(task); }, &work);
    }

private:
    using Call = void (*)(const void* work, int64_t task);

    void run(int64_t n_tasks, Call call, const void* work);
    void stop();
    void take_tasks();
    void serve(Sleeper& self);
    void await_job(uint64_t seen, Sleeper& self);
    void wake();

    std::unique_ptr<Sleeper[]> sleepers_;  // one of each thread
    std::vector<std::thread> threads_;
    std::mutex run_mutex_;
    // The job. Written only while it is not open and no thread is active.
    Call call_ = nullptr;
    const void* work_ = nullptr;
    int64_t n_tasks_ = 0;
    // On lines of their own: all threads write the first two.
    alignas(64) std::atomic<int64_t> next_{0};
    alignas(64) std::atomic<int> n_active_{0};
    alignas(64) std::atomic<uint64_t> job_{0};  // odd: open; each job adds two
    std::atomic<bool> stops_{false};
    std::atomic<int> n_sleeping_{0};
    std::mutex sleep_mutex_;
    std::condition_variable wake_;
};

}  // namespace prima
