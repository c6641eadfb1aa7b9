// Selection of the best matches: kernel arguments and launcher.
#pragma once

#include "launch.h"

namespace bkd {

// distance (queries, shots, H, W), displacement (queries, shots, 2, H, W), shot (queries, shots); position
// (queries, H, W, count).
struct SelectMatches {
  int64_t queries;
  int shots, height, width, count;
  const float* distance;
  const float* displacement;
  const int64_t* shot;
  int64_t* position;

  BKD_HOST_DEVICE int64_t pixels() const { return int64_t{height} * width; }
};

void select_matches(const SelectMatches& p, const Device& device);

}  // namespace bkd
