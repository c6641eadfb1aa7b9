// The template of an operator: output = scale * input. To add an operator, copy the files scaled_copy.*.
#pragma once

#include "kernel.h"

namespace bkd {

template <class T>
struct ScaledCopy {
  Parallel parallel;
  int64_t count;
  T scale;
  const T* input;
  T* output;
};

BKD_DECLARE_KERNEL(scaled_copy, ScaledCopy)

}  // namespace bkd
