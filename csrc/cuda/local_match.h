// Local matching: kernel arguments and launcher.
#pragma once

#include "launch.h"

namespace bkd {

constexpr int kMaxRadius = 8;

// query (queries, H, W, channels) in float32 and support (images, H, W, channels); channels are whole 16-byte
// chunks of the support, zero beyond `unpadded_channels`. shot (queries, shots). distance (queries, shots, H, W),
// displacement (queries, shots, 2, H, W).
struct LocalMatch {
  int queries, images, shots, channels, unpadded_channels, height, width, radius;
  const float* query;
  const void* support;
  const int64_t* shot;  // a shot outside [0, images) has no candidates
  float* distance;
  float* displacement;

  BKD_HOST_DEVICE int64_t pixels() const { return int64_t{height} * width; }
  BKD_HOST_DEVICE int64_t results() const { return int64_t{queries} * shots * pixels(); }
};

// type: of the support.
void local_match(const LocalMatch& p, Type type, const Device& device);

}  // namespace bkd
