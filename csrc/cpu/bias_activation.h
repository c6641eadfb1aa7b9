// Bias, shortcut and activation of a convolution: the arguments of the kernel.
#pragma once

#include "kernel.h"

namespace bkd {

// output = min(max(x + bias + residual, low), high). Rows of `length` numbers: pixels of as many channels where
// channels are last, otherwise the pixels of one channel, row % channels. residual: null for none.
template <class T>
struct BiasActivation {
  Parallel parallel;
  int64_t rows, length, channels;
  bool channels_last;
  T low, high;
  const T *x, *bias, *residual;
  T* output;
};

BKD_DECLARE_KERNEL(bias_activation, BiasActivation)

}  // namespace bkd
