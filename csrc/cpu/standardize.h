// Averaged and standardised features: the arguments of the kernel.
#pragma once

#include "kernel.h"

namespace bkd {

// output = (average - mean) / std of (images, height, width, channels). average: of a square of `patch` pixels a side,
// with zeros beyond the image or of what is inside. x has the layout of output, or its channels first if patch is 1.
template <class T>
struct Standardize {
  Parallel parallel;
  int64_t images, channels, height, width, patch;
  bool channels_first, zeros;
  const T *x, *mean, *std;
  T* output;
};

BKD_DECLARE_KERNEL(standardize, Standardize)

}  // namespace bkd
