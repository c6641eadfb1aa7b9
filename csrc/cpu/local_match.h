// Matching in a window: the arguments of its kernel.
#pragma once

#include "kernel.h"

namespace bkd {

constexpr int64_t MAX_MATCH_RADIUS = 8;

// What a support's numbers are: the query's type, or 16 bits of a float.
enum class Numbers { Same, Half, BFloat };

struct Move {
  int64_t y, x;
};

// query (N, H, W, C), support (P, H, W, C), shot (N, k) of 0 to P - 1; distance (N, k, H, W), displacement
// (N, k, 2, H, W).
template <class T>
struct LocalMatch {
  Parallel parallel;
  int64_t threads;
  int64_t batch, shots, channels, height, width, radius;
  const Move* moves;  // of the window, in the order in which equal distances are preferred
  const T* query;
  const char* support;
  Numbers numbers;  // of the support
  int64_t bytes;    // of one of them
  const int64_t* shot;
  T* distance;
  T* displacement;

  // A pixel of the image that a pair of a query and a shot is about.
  BKD_INLINE const char* image(int64_t pair, int64_t pixel) const {
    return support + (shot[pair] * height * width + pixel) * channels * bytes;
  }
};

BKD_DECLARE_KERNEL(local_match, LocalMatch)

}  // namespace bkd
