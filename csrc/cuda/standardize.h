// Averaged and standardised features: kernel arguments and launcher.
#pragma once

#include "launch.h"

namespace bkd {

// output (images, height, width, channels) in float32; x in the same layout, or (images, channels, height, width).
// mean, std (channels). patch: side of the averaged square, odd; border: exponent of the share inside the image. All
// start at 16 bytes.
struct Standardize {
  int64_t images;
  int channels, height, width, patch;
  bool channels_first;
  float border;
  const void* x;
  const float *mean, *std;
  float* output;
};

void standardize(const Standardize& p, Type type, const Device& device);

}  // namespace bkd
