// A level of features, as the kernels of the anomaly map and of the distillation loss take it.
#pragma once

#include "kernel.h"

namespace bkd {

// One level of features: element (n, c, pixel) at n * image + c * channel_stride + pixel * pixel_stride,
// one of the two strides being 1.
template <class T>
struct Level {
  int64_t channels, height, width, channel_stride, pixel_stride;
  const T* teacher;
  const T* const* student;  // one for each branch
  const T* weight;          // of each branch
  BKD_INLINE int64_t pixels() const { return height * width; }
  BKD_INLINE int64_t image() const { return channels * height * width; }
};

}  // namespace bkd
