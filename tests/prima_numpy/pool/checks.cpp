// Checks of the thread pool, by name: `checks NAME` ends with 0 and nothing said, or says what is wrong. A check that
// cannot go on hangs: test_pool.py gives it so long.

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "pool.h"

namespace {

using prima::ThreadPool;

// Zero until so many have arrived.
class Gate {
public:
    void arrive() {
        std::lock_guard<std::mutex> lock(mutex_);
        ++n_;
        changed_.notify_all();
    }

    void await(int64_t n) {
        std::unique_lock<std::mutex> lock(mutex_);
        changed_.wait(lock, [&] { return n_ >= n; });
    }

private:
    std::mutex mutex_;
    std::condition_variable changed_;
    int64_t n_ = 0;
};

bool each_ran(const std::unique_ptr<std::atomic<int>[]>& runs, int64_t n, int times) {
    for (int64_t i = 0; i < n; ++i) {
        if (runs[size_t(i)] != times) {
            std::printf("task %d of %d ran %d times, not %d\n", int(i), int(n), int(runs[size_t(i)]), times);
            return false;
        }
    }
    return true;
}

bool runs_each_task_once() {
    for (int n_threads = 1; n_threads <= 9; ++n_threads) {
        ThreadPool pool(n_threads);
        for (int64_t n : {0, 1, 2, 3, 7, 8, 9, 500}) {
            std::unique_ptr<std::atomic<int>[]> runs(new std::atomic<int>[size_t(n) + 1]());
            for (int round = 0; round < 50; ++round) {
                pool.run(n, [&](int64_t i) { ++runs[size_t(i)]; });
                if (!each_ran(runs, n, round + 1)) return false;
            }
        }
    }
    return true;
}

// The first task ends when all others have: whoever has it, the other threads do the rest.
bool goes_on_beside_a_slow_task() {
    for (int n_threads : {2, 3, 8}) {
        ThreadPool pool(n_threads);
        for (int round = 0; round < 20; ++round) {
            Gate others;
            pool.run(40, [&](int64_t i) { i == 0 ? others.await(39) : others.arrive(); });
        }
    }
    return true;
}

// As many tasks as threads, none of which ends before all have begun: also after the threads have gone to sleep.
bool uses_all_threads() {
    for (int n_threads : {2, 5}) {
        ThreadPool pool(n_threads);
        for (int round = 0; round < 20; ++round) {
            Gate all;
            pool.run(n_threads, [&](int64_t) {
                all.arrive();
                all.await(n_threads);
            });
            if (round % 4 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(2));  // long enough to sleep
        }
    }
    return true;
}

// A thread that has slept begins on another core than the caller's, and may use all cores as before.
bool wakes_threads_on_other_cores() {
#if defined(__linux__)
    cpu_set_t all, here;
    sched_getaffinity(0, sizeof all, &all);
    if (CPU_COUNT(&all) < 2) return true;
    constexpr int n_rounds = 20;
    int n_beside = 0;
    std::atomic<int> n_restricted{0};
    ThreadPool pool(2);
    const std::thread::id caller = std::this_thread::get_id();
    const int core = sched_getcpu();
    CPU_ZERO(&here);
    CPU_SET(size_t(core), &here);
    sched_setaffinity(0, sizeof here, &here);  // the caller stays where it is
    for (int round = 0; round < n_rounds; ++round) {
        std::this_thread::sleep_for(std::chrono::milliseconds(5));  // long enough to sleep
        Gate both;
        std::atomic<bool> is_beside{false};
        pool.run(2, [&](int64_t) {
            if (std::this_thread::get_id() != caller) {
                is_beside = sched_getcpu() == core;
                cpu_set_t now;
                sched_getaffinity(0, sizeof now, &now);
                n_restricted += !CPU_EQUAL(&all, &now);
            }
            both.arrive();
            both.await(2);
        });
        n_beside += is_beside;
    }
    if (n_restricted != 0) std::printf("a thread was kept off a core for good\n");
    if (n_beside > n_rounds / 2) std::printf("a thread woke beside its caller in %d rounds of 20\n", n_beside);
    return n_restricted == 0 && n_beside <= n_rounds / 2;  // the system may move a thread at any time
#else
    return true;
#endif
}

// Whoever gives a thread other cores while it sleeps (taskset does) is not undone by its waking.
bool keeps_the_cores_that_a_sleeping_thread_is_given() {
#if defined(__linux__)
    cpu_set_t all;
    sched_getaffinity(0, sizeof all, &all);
    ThreadPool pool(2);
    const std::thread::id caller = std::this_thread::get_id();
    const auto at_other_thread = [&](const auto& work) {
        Gate both;
        pool.run(2, [&](int64_t) {
            if (std::this_thread::get_id() != caller) work();
            both.arrive();
            both.await(2);
        });
    };
    std::atomic<pid_t> thread{0};
    at_other_thread([&] { thread = pid_t(syscall(SYS_gettid)); });
    for (int core = 0; core < CPU_SETSIZE; ++core) {
        if (!CPU_ISSET(size_t(core), &all)) continue;
        cpu_set_t one, now;
        CPU_ZERO(&one);
        CPU_SET(size_t(core), &one);
        std::this_thread::sleep_for(std::chrono::milliseconds(5));  // long enough to sleep
        sched_setaffinity(thread, sizeof one, &one);
        at_other_thread([&] { sched_getaffinity(0, sizeof now, &now); });
        if (!CPU_EQUAL(&one, &now)) return false;
    }
#endif
    return true;
}

bool serves_many_callers() {
    ThreadPool pool(3);
    constexpr int n_callers = 6, n_rounds = 200;
    constexpr int64_t n_tasks = 20;
    std::unique_ptr<std::atomic<int>[]> runs(new std::atomic<int>[n_callers * n_tasks]());
    std::atomic<int> n_unfinished{0};
    std::vector<std::thread> callers;
    for (int caller = 0; caller < n_callers; ++caller) {
        callers.emplace_back([&, caller] {
            for (int round = 1; round <= n_rounds; ++round) {
                pool.run(n_tasks, [&](int64_t i) { ++runs[size_t(caller * n_tasks + i)]; });
                for (int64_t i = 0; i < n_tasks; ++i) n_unfinished += runs[size_t(caller * n_tasks + i)] != round;
            }
        });
    }
    for (std::thread& caller : callers) caller.join();
    if (n_unfinished != 0) std::printf("run came back before %d tasks\n", int(n_unfinished));
    return n_unfinished == 0 && each_ran(runs, n_callers * n_tasks, n_rounds);
}

bool runs_tasks_of_tasks() {
    for (int n_threads : {1, 3}) {
        ThreadPool pool(n_threads);
        std::unique_ptr<std::atomic<int>[]> runs(new std::atomic<int>[8 * 5]());
        for (int round = 1; round <= 50; ++round) {
            pool.run(8, [&](int64_t i) { pool.run(5, [&](int64_t j) { ++runs[size_t(5 * i + j)]; }); });
            if (!each_ran(runs, 8 * 5, round)) return false;
        }
    }
    return true;
}

bool ends_awake_or_asleep() {
    for (int round = 0; round < 50; ++round) {
        ThreadPool pool(4);
        if (round % 2) pool.run(4, [](int64_t) {});
        if (round % 10 == 9) std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
    return true;
}

struct Check {
    const char* name;
    bool (*run)();
};

constexpr Check kChecks[] = {
    {"runs_each_task_once", runs_each_task_once},
    {"goes_on_beside_a_slow_task", goes_on_beside_a_slow_task},
    {"uses_all_threads", uses_all_threads},
    {"wakes_threads_on_other_cores", wakes_threads_on_other_cores},
    {"keeps_the_cores_that_a_sleeping_thread_is_given", keeps_the_cores_that_a_sleeping_thread_is_given},
    {"serves_many_callers", serves_many_callers},
    {"runs_tasks_of_tasks", runs_tasks_of_tasks},
    {"ends_awake_or_asleep", ends_awake_or_asleep},
};

}  // namespace

int main(int n_arguments, char** arguments) {
    for (const Check& check : kChecks) {
        if (n_arguments == 2 && std::strcmp(check.name, arguments[1]) == 0) return check.run() ? 0 : 1;
    }
    std::printf("no such check\n");
    return 2;
}
