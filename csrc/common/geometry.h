// The geometry of a convolution.
#pragma once

#include "checks.h"

namespace bkd {
namespace {

struct Geometry {
  const Integers &kernel, &stride, &padding, &dilation;

  // Throws if `offset` does not have the size of the convolution's output, or the input is too large.
  void check(const Checks& check, const Tensor& input, const Tensor& offset) const {
    check.pair("kernel_size", kernel, 1), check.pair("stride", stride, 1);
    check.pair("padding", padding, 0), check.pair("dilation", dilation, 1);
    check.in_range("the number of taps", kernel[0] * kernel[1], 1, MAX_INT);
    check.that(input.size(2) <= MAX_INT && input.size(3) <= MAX_INT && input.size(2) * input.size(3) <= MAX_INT,
               "an image", "has shape " + to_text(sizes_of(input)), "at most " + std::to_string(MAX_INT) + " pixels");
    for (int axis = 0; axis < 2; ++axis) {
      const int64_t space = input.size(2 + axis) + 2 * padding[axis] - dilation[axis] * (kernel[axis] - 1) - 1;
      check.that(space >= 0 && offset.size(2 + axis) == space / stride[axis] + 1, "offset",
                 "has shape " + to_text(sizes_of(offset)), "the size of the convolution's output");
    }
  }
};

}  // namespace
}  // namespace bkd
