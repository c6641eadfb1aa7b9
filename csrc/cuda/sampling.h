// Sampling parameters of a deformable convolution, and outputs of its gradients.
#pragma once

#include "launch.h"

namespace bkd {

// offset (image, 2 (group taps + tap) + {y, x}, pixel), mask (image, group taps + tap, pixel), channels-first or -last.
// Pixel indices over all images fit in 32 bits.
struct Sampling {
  const void* offset;
  const void* mask;                  // null: all ones
  bool float_offset, float_mask;     // else the input's type
  int64_t offset_image, mask_image;  // strides between images
  int offset_channel, offset_pixel, mask_channel, mask_pixel;
  int height, width, out_height, out_width;
  int taps, kernel_width, stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x;

  BKD_HOST_DEVICE int pixels() const { return out_height * out_width; }
};

// Accumulator that many blocks add to with atomics. float32 sums depend on the order of additions; fixed-point sums
// (value times *scale, rounded to int64) do not. The caller chooses the scale so that no sum overflows.
struct Accumulator {
  float* floating;
  unsigned long long* fixed;
  const float* scale;

  BKD_HOST_DEVICE bool needed() const { return floating || fixed; }
};

// float32 gradients with respect to offset (image, 2 (group taps + tap) + {y, x}, pixel) and mask (image,
// group taps + tap, pixel).
struct SamplingGradients {
  float* offset;
  float* mask;

  BKD_HOST_DEVICE bool needed() const { return offset || mask; }
};

}  // namespace bkd
