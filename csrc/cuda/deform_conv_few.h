// Modulated deformable convolution of groups of few channels: kernel arguments and launchers.
#pragma once

#include "sampling.h"

namespace bkd {

constexpr int kFewChannels = 8;  // of a chunk: whole groups of 1, 2, 4 or 8 channels, of one offset group

// Channels-last: input (image, H, W, channels), output (image, H', W', outputs). Each offset group is filled up to
// whole chunks with groups that have no outputs. A round is `width` outputs of every group, which has as many channels.
// weight (rounds, taps, width, channels): for each output of the channel's group. grad (image, H', W', rounds,
// channels): the outputs of a group lie where its channels do.
struct DeformConvFew {
  Sampling sampling;
  int pixels;  // output pixels of all images
  int outputs, group_outputs;
  int channels, offset_groups;
  int chunks, offset_chunks;  // of all channels, of one offset group
  int own_groups;             // of an offset group, without those that have no outputs
  int width, rounds;
  int group_channels;   // of `width`, those that are not filled up
  bool whole;           // a thread's outputs are adjacent
  uint32_t input_line;  // bytes of a pixel of the input
  const void* input;
  const void* weight;
  const void* bias;  // null, or of the input's type
  void* output;
  const void* grad;
  Accumulator grad_input;
  SamplingGradients grad_sampling;
  float* grad_weight;  // (parts, rounds, taps, width, channels)
  int parts;           // splits of the pixels, each with its own partial sum
};

void deform_conv_few(const DeformConvFew& p, Type type, const Device& device);
// Gradients with respect to input, offset and mask; null outputs are skipped.
void deform_conv_few_backward(const DeformConvFew& p, Type type, const Device& device);
void deform_conv_few_weight(const DeformConvFew& p, Type type, const Device& device);

}  // namespace bkd
