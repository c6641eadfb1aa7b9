// Bias, shortcut and activation of a convolution: what the kernel is given, and how it is launched.
#pragma once

#include "launch.h"

namespace bkd {

// output = min(max(x + bias + residual, low), high) of `count` numbers, of which `run` adjacent ones have one channel:
// the pixels of an image, or 1 where channels are last. All start at 16 bytes; residual is null for none.
//
// Where x is part of a larger channels_last image, `row` numbers are adjacent in it, `height` rows make an image, and
// rows and images start at strides of whole chunks of 16 bytes; then channels are whole chunks too. Otherwise row is 0.
struct BiasActivation {
  int64_t count, run, channels;
  int64_t row, height, row_stride, image_stride;
  float low, high;
  const void *x, *bias, *residual;
  void* output;
};

void bias_activation(const BiasActivation& p, Type type, const Device& device);

}  // namespace bkd
