// What every launcher is told. Interfaces (*.h) are plain C++: bindings need no CUDA compiler.
#pragma once

#include <cstdint>

#include "../common/both.h"

namespace bkd {

enum class Type { kFloat, kHalf, kBFloat };

// Where kernels are started, and for how many processors.
struct Device {
  void* stream;
  int processors;
};

}  // namespace bkd
