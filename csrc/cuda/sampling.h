// Where the taps of a deformable convolution read, and where the gradients of its samples go.
#pragma once

#include "launch.h"

namespace bkd {

// Offsets (image, 2 (group taps + tap) + {y, x}, pixel) and mask (image, group taps + tap, pixel), channels first or
// last. Pixels are counted over all images, and fit in 32 bits.
struct Sampling {
  const void* offset;
  const void* mask;                  // null: ones
  bool float_offset, float_mask;     // else of the input's type
  int64_t offset_image, mask_image;  // from one image to the next
  int offset_channel, offset_pixel, mask_channel, mask_pixel;
  int height, width, out_height, out_width;
  int taps, kernel_width, stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x;

  BKD_BOTH int pixels() const { return out_height * out_width; }
};

// Sums that many blocks add to. Floats in the order in which they come; or whole numbers, of which the order does not
// matter: a value times *scale, rounded, where the caller has chosen the scale so that no sum overflows.
struct Accumulator {
  float* plain;
  unsigned long long* exact;
  const float* scale;

  BKD_BOTH bool wanted() const { return plain || exact; }
  BKD_BOTH Accumulator from(int64_t index) const {
    return {plain ? plain + index : nullptr, exact ? exact + index : nullptr, scale};
  }
};

// Gradients by offset and mask, in float: (image, 2 (group taps + tap) + {y, x}, pixel), (image, group taps + tap,
// pixel).
struct MoveGradients {
  float* offset;
  float* mask;

  BKD_BOTH bool wanted() const { return offset || mask; }
};

}  // namespace bkd
