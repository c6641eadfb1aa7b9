// Linear interpolation between the pixels of a level, as PyTorch's.
#pragma once

#include "device.cuh"

namespace bkd {
namespace {

struct Interpolation {
  int first, second;
  float fraction;  // of the second
};

// Of pixel `at` of `length` on a level of `level_length`.
__device__ __forceinline__ Interpolation interpolation(int at, int length, int level_length, bool align_corners) {
  float x;
  if (align_corners) {
    x = length > 1 ? static_cast<float>(at) * (static_cast<float>(level_length - 1) / static_cast<float>(length - 1))
                   : 0.0f;
  } else {
    const float ratio = static_cast<float>(level_length) / static_cast<float>(length);
    x = fmaxf((static_cast<float>(at) + 0.5f) * ratio - 0.5f, 0);
  }
  const int first = min(static_cast<int>(x), level_length - 1);
  return {first, min(first + 1, level_length - 1), x - static_cast<float>(first)};
}

}  // namespace
}  // namespace bkd
