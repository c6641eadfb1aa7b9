// The emulated device, as the bindings ask for it; the tests change it.
#pragma once

namespace emulated {

inline int multiprocessors = 4;
inline int shared_bytes = 164 * 1024;  // of a multiprocessor
inline bool dry = false;               // record launches without running them

}  // namespace emulated
