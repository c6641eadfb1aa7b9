// The pixels that match best: the arguments of the kernel.
#pragma once

#include "kernel.h"

namespace bkd {

constexpr int64_t MAX_MATCHES = 64;

// distance (N, k, H, W), displacement (N, k, 2, H, W), shot (N, k); position (N, H, W, count).
template <class T>
struct SelectMatches {
  Parallel parallel;
  int64_t batch, shots, height, width, count;
  const T* distance;
  const T* displacement;
  const int64_t* shot;
  int64_t* position;
};

BKD_DECLARE_KERNEL(select_matches, SelectMatches)

}  // namespace bkd
