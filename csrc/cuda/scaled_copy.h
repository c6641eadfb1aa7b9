// Operator template: kernel arguments and launcher. To add an operator, copy the files scaled_copy.*.
#pragma once

#include "launch.h"

namespace bkd {

// output = scale * input; both are 16-byte aligned.
struct ScaledCopy {
  int64_t count;
  float scale;
  const void* input;
  void* output;
};

void scaled_copy(const ScaledCopy& p, Type type, const Device& device);

}  // namespace bkd
