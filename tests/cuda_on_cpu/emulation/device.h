// The emulated device, as the bindings ask for it; the tests change it.
#pragma once

namespace emulated {

inline int multiprocessors = 4;
inline int shared_bytes = 164 * 1024;  // of a multiprocessor
inline bool dry = false;               // record launches without running them
inline bool wgmma = false;             // the device is one of 9.0a

}  // namespace emulated
