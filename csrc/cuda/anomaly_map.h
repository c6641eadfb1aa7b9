// The anomaly map (Eq. 13): kernel arguments and launchers.
#pragma once

#include "pairs.h"

namespace bkd {

// d = sum over the branches of weight ((1 - value_share) (1 - cos) + value_share mean squared difference).
struct Distances {
  Pair pair;
  float weight[kMaxBranches];
  float value_share;
  int channels;       // of the mean: without padding to 16-byte chunks
  float* output;      // (images, pixels)
  bool add;           // accumulate into output
  float* statistics;  // null, or laid out as in PairGradient
};

void distances(const Distances& p, Type type, const Device& device);

constexpr int kMaxLevels = 8;

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
