// The template of an operator: what its kernel is given, and how it is launched. To add an operator, copy the files
// scaled_copy.*.
#pragma once

#include "launch.h"

namespace bkd {

// output = scale * input. Both start at 16 bytes.
struct ScaledCopy {
  int64_t count;
  float scale;
  const void* input;
  void* output;
};

void scaled_copy(const ScaledCopy& p, Type type, const Device& device);

}  // namespace bkd
