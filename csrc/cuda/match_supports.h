// Matching and combination of supports: kernel arguments and launcher.
#pragma once

#include "launch.h"

namespace bkd {

constexpr int kMaxMatchedViews = 8;  // views per launch
constexpr int kMaxMatchedShots = 64;

// Per view: query, output (queries, height, width, channels) in float32 and support (images, height, width, channels);
// channels are whole 16-byte chunks of the support, zero beyond `unpadded_channels`. shot (queries, shots): one outside
// [0, images) has no candidates. neighbors: at most kFewNeighbors.
struct MatchSupports {
  struct View {
    int channels, unpadded_channels, height, width, radius;
    const float* query;
    const void* support;
    float* output;
    int64_t blocks;  // set by the launcher
    int lanes;       // that share a pixel; set by the launcher

    BKD_HOST_DEVICE int64_t pixels() const { return int64_t{height} * width; }
  } view[kMaxMatchedViews];
  int views, queries, images, shots, neighbors;
  float ridge;
  const int64_t* shot;
};

// type: of the supports.
void match_supports(MatchSupports p, Type type, const Device& device);

}  // namespace bkd
