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
};

}  // namespace bkd
