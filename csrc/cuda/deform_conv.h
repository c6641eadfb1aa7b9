// Modulated deformable convolution: what its kernels are given, and how they are started. deform_conv.cpp fills it in.
#pragma once

#include "sampling.h"

namespace bkd {

// Images are channels-last: input (image, H, W, channels), output and grad (image, H', W', outputs); weight is
// (outputs, taps, channels / groups). Channels of a group and of an offset group, and for the gradients outputs of a
// group, are whole chunks of 16 bytes.
struct DeformConv {
  Sampling sampling;
  int pixels;  // of all images' outputs
  int channels, outputs, groups, offset_groups;
  const void* input;
  const void* weight;
  const void* bias;  // null, or of the input's type
  void* output;
  const void* grad;
  Accumulator grad_input;
  MoveGradients grad_moves;
  float* grad_weight;  // (parts, outputs, taps, channels / groups)
  int parts;           // of the pixels, each with a sum of its own

  BKD_BOTH int group_channels() const { return channels / groups; }
  BKD_BOTH int group_outputs() const { return outputs / groups; }
  BKD_BOTH int offset_channels() const { return channels / offset_groups; }
};

// tf32: floats may be multiplied as TF32.
void deform_conv(const DeformConv& p, Type type, bool tf32, const Device& device);
// Gradients by input, offset and mask: those of grad_input and grad_moves that are not null.
void deform_conv_backward(const DeformConv& p, Type type, bool tf32, const Device& device);
void deform_conv_weight(const DeformConv& p, Type type, bool tf32, const Device& device);

}  // namespace bkd
