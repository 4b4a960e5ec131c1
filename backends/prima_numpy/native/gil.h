// Releasing the GIL around work, also while the interpreter ends.
//
// Up to Python 3.13 a daemon thread that asks for the GIL of an ending interpreter is unwound by pthread_exit, and the
// unwinding would meet C++ frames that end the process with "terminate called without an active exception". So from
// the `atexit` hook on, a thread that comes back from work sleeps instead of asking (as Python 3.14 does by itself).
#pragma once

#include <nanobind/nanobind.h>

#include <atomic>
#include <chrono>
#include <thread>

namespace prima {

class GilRelease {
public:
    GilRelease() : state_(PyEval_SaveThread()) {}
    ~GilRelease() {
        ++n_returning_;
        if (is_ending_ && std::this_thread::get_id() != ending_thread_) {
            --n_returning_;
            for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
        }
        PyEval_RestoreThread(state_);
        --n_returning_;
    }
    GilRelease(const GilRelease&) = delete;
    GilRelease& operator=(const GilRelease&) = delete;

    // For `atexit`: from now on no other thread comes back, and none is on its way.
    static void end() {
        ending_thread_ = std::this_thread::get_id();
        is_ending_ = true;
        PyThreadState* state = PyEval_SaveThread();
        while (n_returning_ > 0) std::this_thread::yield();
        PyEval_RestoreThread(state);
    }

private:
    PyThreadState* state_;
    static inline std::atomic<bool> is_ending_{false};
    static inline std::atomic<int> n_returning_{0};
    static inline std::thread::id ending_thread_{};
};

}  // namespace prima
