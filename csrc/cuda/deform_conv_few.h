// Modulated deformable convolution of groups of few channels: kernel arguments and launcher.
#pragma once

#include "sampling.h"

namespace bkd {

constexpr int kFewChannels = 8;  // of a thread: whole groups of 1, 2, 4 or 8 channels, of one offset group

// Channels-last: input (image, H, W, chunks x 8), output (image, H', W', outputs). A chunk is 8 channels; each offset
// group is filled up to whole chunks with groups that have no outputs. weight (rounds, taps, chunks, 8, width): of
// `width` outputs of every group at a time, the channels of the output's group, of which there are `width`.
struct DeformConvFew {
  Sampling sampling;
  int pixels;  // output pixels of all images
  int outputs, group_outputs;
  int chunks, offset_chunks;  // of all channels, of one offset group
  int own_groups;             // of an offset group, without those that have no outputs
  int width, rounds;
  bool whole;           // a thread's outputs are adjacent
  uint32_t input_line;  // bytes of a pixel of the input
  const void* input;
  const void* weight;
  const void* bias;  // null, or of the input's type
  void* output;
};

void deform_conv_few(const DeformConvFew& p, Type type, const Device& device);

}  // namespace bkd
