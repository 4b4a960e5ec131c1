// What this CPU can do, and which variants of the kernels can run on it.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "kernels.h"

namespace prima {

// Every feature that matters to some kernel, with whether CPU and operating system have it.
std::vector<std::pair<std::string, bool>> cpu_features();

// Usable here, best first; "portable" is always last.
std::vector<const Table*> usable_tables();

// Whether the system lets this process use what a usable variant needs. To be asked before a variant runs, not earlier:
// what is granted (the tile registers of AMX) makes every later signal frame of the process larger.
bool obtain(const Table& table);

}  // namespace prima
