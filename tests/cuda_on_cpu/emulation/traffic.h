// Counts what kernels move: bytes and 32-byte sectors of global memory, and conflicts between banks of shared memory,
// for each place in the source. Off unless asked for.
#pragma once

#include <cstddef>
#include <string>

namespace emulated::traffic {

enum class Kind { kLoad, kStore, kMatrix, kAtomic };

void count(bool on);   // starts anew, or stops
std::string report();  // a JSON list: place, kind, memory, bytes, requests, sectors or passes, least possible
void global(const void* address, int bytes, Kind kind, const char* file, int line);
void shared(const void* address, int bytes, Kind kind, const char* file, int line);
void end_block();  // accesses of a block are compared within its warps

}  // namespace emulated::traffic
