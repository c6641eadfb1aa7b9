// Matching in a window: what its kernel is given, and how it is started.
#pragma once

#include "launch.h"

namespace bkd {

constexpr int kMaxRadius = 8;

// query (queries, H, W, channels) in float32 and support (images, H, W, channels); channels are whole chunks of 16
// bytes of the support, those beyond `own` zero. shot (queries, shots). distance (queries, shots, H, W), displacement
// (queries, shots, 2, H, W).
struct LocalMatch {
  int queries, images, shots, channels, own, height, width, radius;
  const float* query;
  const void* support;
  const int64_t* shot;  // those that are no image have no candidates
  float* distance;
  float* displacement;

  BKD_BOTH int64_t pixels() const { return int64_t{height} * width; }
  BKD_BOTH int64_t results() const { return int64_t{queries} * shots * pixels(); }
};

// type: of the support.
void local_match(const LocalMatch& p, Type type, const Device& device);

}  // namespace bkd
