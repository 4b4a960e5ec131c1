// What happens when weights are read from a map whose file is not there any more (SIGBUS): a word goes through a pipe
// to a thread of Python's, which says why and ends the process; if it cannot, the process ends all the same.

#include <dlfcn.h>
#include <errno.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <mutex>
#include <stdexcept>

#include <nanobind/nanobind.h>

namespace {

constexpr int n_places = 1024;
constexpr time_t patience_s = 2;

struct Place {
  std::atomic<uintptr_t> begin{0}, end{0};  // equal: free
  std::atomic<int> pipe{-1};
};

Place places[n_places];  // of the process, as signals are
std::mutex changing;     // never taken by the handler
std::atomic<int> exit_code{1};
struct sigaction before;
int (*holds_gil)() = nullptr;

int place_of(uintptr_t address) {
  for (int i = 0; i < n_places; ++i)
    if (places[i].begin.load() <= address && address < places[i].end.load()) return i;
  return -1;
}

// The interrupted instruction reads a weight: it is inside no allocator and holds no lock but, perhaps, the GIL.
void on_bus_error(int number, siginfo_t* info, void*) {
  const bool is_fault = info->si_code > 0;  // else it was sent by somebody
  const int place = is_fault ? place_of(reinterpret_cast<uintptr_t>(info->si_addr)) : -1;
  if (place < 0) {  // not ours: as if we had never been here
    sigaction(number, &before, nullptr);
    if (!is_fault) raise(number);
    return;
  }
  const int32_t word = place;
  const bool is_told = write(places[place].pipe.load(), &word, sizeof word) == sizeof word;
  if (is_told && holds_gil && holds_gil()) PyEval_SaveThread();
  timespec left{is_told ? patience_s : 0, 0};
  while (nanosleep(&left, &left) != 0 && errno == EINTR) {
  }
  _exit(exit_code.load());
}

int watch(uintptr_t begin, uintptr_t end, int pipe, int code) {
  const std::lock_guard<std::mutex> lock(changing);
  static bool is_installed = false;
  if (!is_installed) {
    holds_gil = reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "PyGILState_Check"));  // not in the stable ABI
    struct sigaction action {};
    action.sa_sigaction = on_bus_error;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigemptyset(&action.sa_mask);
    if (sigaction(SIGBUS, &action, &before) != 0) throw std::runtime_error("no handler for SIGBUS can be set");
    is_installed = true;
  }
  exit_code = code;
  for (int i = 0; i < n_places; ++i) {
    if (places[i].begin.load() != places[i].end.load()) continue;
    places[i].pipe = pipe;
    places[i].begin = begin;
    places[i].end = end;
    return i;
  }
  return -1;
}

void forget(int place) {
  if (place < 0 || place >= n_places) throw std::out_of_range("no such place");
  const std::lock_guard<std::mutex> lock(changing);
  places[place].end = 0;
  places[place].begin = 0;
}

}  // namespace

NB_MODULE(_lastwords, module) {
  namespace nb = nanobind;
  module.def("watch", &watch, nb::arg("begin"), nb::arg("end"), nb::arg("pipe"), nb::arg("exit_code"),
             "A fault at an address of [begin, end) writes the number that is returned, an int32, to `pipe`; two "
             "seconds later the process ends with `exit_code`. -1: there is no room for more.");
  module.def("forget", &forget, nb::arg("place"));
}
