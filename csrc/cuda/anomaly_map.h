// The anomaly map (Eq. 13): what its kernels are given, and how they are started.
#pragma once

#include "pairs.h"

namespace bkd {

// d = sum over the branches of weight ((1 - value_share) (1 - cos) + value_share mean squared difference).
struct Distances {
  Pair pair;
  float weight[kMostBranches];
  float value_share;
  int channels;       // that count in the mean: without those that only fill chunks
  float* output;      // (images, pixels)
  bool add;           // to what output holds
  float* statistics;  // null, or as PairGradient has them
};

void distances(const Distances& p, Type type, const Device& device);

constexpr int kMostLevels = 8;

struct AnomalyMap {
  int levels, images, height, width, radius;
  const float* distances[kMostLevels];  // (images, level_height, level_width)
  int level_height[kMostLevels], level_width[kMostLevels];
  bool product, align_corners;
  float sigma, scale;  // of the Gaussian, and what makes its weights sum to one
  float* rows;         // (images, height, width), smoothed along the rows
  float* output;       // (images, height, width)
};

void anomaly_map(const AnomalyMap& p, const Device& device);

}  // namespace bkd
