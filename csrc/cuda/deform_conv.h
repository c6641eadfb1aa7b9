// Modulated deformable convolution: kernel arguments and launchers.
#pragma once

#include "sampling.h"

namespace bkd {

// Of the forward pass; conv_policy.h chooses it.
struct ConvPlan {
  int rows, columns;  // pixels and outputs of a tile
  int parts;          // splits of the depth (split K), each with its own partial sum
  int tables;         // neighbours of as many taps are in shared memory at a time
  int shared;         // bytes of a block
  int64_t arranged;   // bytes of weights in the order of wgmma; 0: products run on mma.sync
};

// Channels-last: input (image, H, W, channels), output and grad (image, H', W', outputs), weight (outputs, taps,
// channels / groups). Channels per group and per offset group and, for gradients, outputs per group are whole 16-byte
// chunks.
struct DeformConv {
  Sampling sampling;
  int pixels;  // output pixels of all images
  int channels, outputs, groups, offset_groups;
  int group_channels, group_outputs, offset_channels;  // of one group; kernels divide slowly
  uint32_t input_line;                                 // bytes of a pixel of the input
  const void* input;
  const void* weight;
  const void* bias;  // null, or of the input's type
  void* output;
  const void* grad;
  Accumulator grad_input;
  SamplingGradients grad_sampling;
  ConvPlan plan;
  float* partial;      // (plan.parts, pixels, outputs); not used if there is one part
  void* arranged;      // weights in the order of wgmma, plan.arranged bytes
  float* grad_weight;  // (parts, outputs, taps, channels / groups)
  int parts;           // splits of the pixels, each with its own partial sum
};

// tf32: allow TF32 for float32. Parts of the depth are summed in order.
void deform_conv(const DeformConv& p, Type type, bool tf32, const Device& device);
// Whether the current device multiplies by wgmma: it is one of 9.0, and there is code for 9.0a.
bool has_wgmma();
// Gradients with respect to input, offset and mask; null outputs are skipped.
void deform_conv_backward(const DeformConv& p, Type type, bool tf32, const Device& device);
void deform_conv_weight(const DeformConv& p, Type type, bool tf32, const Device& device);

}  // namespace bkd
