// Means over the cells of a grid: kernel arguments and launcher.
#pragma once

#include "launch.h"

namespace bkd {

// x (images, channels, height, width), contiguous or channels_last; output (images, channels, grid, grid), contiguous.
struct GridMeans {
  int64_t images;
  int channels, height, width, grid;
  bool channels_last;
  const float* x;
  float* output;
};

void grid_means(const GridMeans& p, const Device& device);

}  // namespace bkd
