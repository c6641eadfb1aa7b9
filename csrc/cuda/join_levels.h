// Levels side by side: kernel arguments and launcher.
#pragma once

#include "launch.h"

namespace bkd {

constexpr int kMaxJoined = 8;  // levels per launch

// output (images, height, width, channels). A level (images, its height, its width, its channels) goes to the channels
// from `first` on. All start at 16 bytes.
struct JoinLevels {
  struct Level {
    const float* x;
    int channels, height, width, first;
    int block_height, block_width;  // pixels that are averaged; 0: interpolated
    float factor;
  } level[kMaxJoined];
  int levels, height, width, channels;
  int64_t images;
  float* output;
};

void join_levels(const JoinLevels& p, const Device& device);

}  // namespace bkd
