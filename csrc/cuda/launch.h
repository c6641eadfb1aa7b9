// Arguments of every launcher. Interfaces (*.h) are plain C++, so that bindings need no nvcc.
#pragma once

#include <cstdint>

#include "../common/host_device.h"

namespace bkd {

enum class Type { kFloat, kHalf, kBFloat };

// The stream to launch on, and the size of the device.
struct Device {
  void* stream;
  int multiprocessors;
  int shared, shared_per_block;  // bytes of shared memory of a multiprocessor, and at most of a block
};

}  // namespace bkd
