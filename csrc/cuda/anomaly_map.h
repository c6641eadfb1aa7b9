// The anomaly map (Eq. 13): kernel arguments and launchers.
#pragma once

#include "pairs.h"

namespace bkd {

constexpr int kMaxLevels = 8;  // per launch

// d = sum over the branches of weight ((1 - value_share) (1 - cos) + value_share mean squared difference). Levels of
// one layout, with equally many branches.
struct Distances {
  struct Level {
    Pair pair;
    float weight[kMaxBranches];
    int channels;       // of the mean: without padding to 16-byte chunks
    float exponent;     // of the finished sum; 1: as it is
    float* output;      // (images, pixels)
    float* statistics;  // null, or laid out as in PairGradient
  } level[kMaxLevels];
  int levels;
  float value_share;
  bool add;    // accumulate into output
  bool raise;  // there are no further branches
};

void distances(const Distances& p, Type type, const Device& device);

struct AnomalyMap {
  int levels, images, height, width, radius;
  const float* distances[kMaxLevels];  // (images, level_height, level_width)
  int level_height[kMaxLevels], level_width[kMaxLevels];
  bool product, align_corners;
  float sigma, scale;  // of the Gaussian, and its normalization
  float* rows;         // scratch (images, height, width), smoothed along rows
  float* output;       // (images, height, width)
};

void anomaly_map(const AnomalyMap& p, const Device& device);

}  // namespace bkd
