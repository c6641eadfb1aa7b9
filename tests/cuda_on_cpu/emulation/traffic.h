// Count memory traffic by source line: bytes and 32-byte sectors of global memory, bank conflicts of shared memory. Off
// by default.
#pragma once

#include <cstddef>
#include <string>

namespace emulated::traffic {

enum class Kind { kLoad, kStore, kMatrix, kAtomic };

void count(bool on);   // reset and start, or stop
std::string report();  // JSON: site, kind, memory, bytes, requests, units (sectors or passes), their minimum
void global(const void* address, int bytes, Kind kind, const char* file, int line);
void shared(const void* address, int bytes, Kind kind, const char* file, int line);
void end_block();  // group a block's accesses by warp

}  // namespace emulated::traffic
