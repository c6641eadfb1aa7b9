// Modulated deformable convolution: kernel arguments and launchers.
#pragma once

#include "sampling.h"

namespace bkd {

// Channels-last: input (image, H, W, channels), output and grad (image, H', W', outputs), weight (outputs, taps,
// channels / groups). Channels per group and per offset group and, for gradients, outputs per group are whole 16-byte
// chunks.
struct DeformConv {
  Sampling sampling;
  int pixels;  // output pixels of all images
  int channels, outputs, groups, offset_groups;
  const void* input;
  const void* weight;
  const void* bias;  // null, or of the input's type
  void* output;
  const void* grad;
  Accumulator grad_input;
  SamplingGradients grad_sampling;
  float* partial;      // forward, (parts, pixels, outputs); not used if there is one part
  float* grad_weight;  // (parts, outputs, taps, channels / groups)
  int parts;           // splits of the depth (split K), each with its own partial sum

  BKD_HOST_DEVICE int group_channels() const { return channels / groups; }
  BKD_HOST_DEVICE int group_outputs() const { return outputs / groups; }
  BKD_HOST_DEVICE int offset_channels() const { return channels / offset_groups; }
};

// Return into how many parts the forward pass splits the depth to fill the device.
int deform_conv_parts(const DeformConv& p, const Device& device);
// tf32: allow TF32 for float32. Parts are summed in order, so the result does not depend on timing.
void deform_conv(const DeformConv& p, Type type, bool tf32, const Device& device);
// Gradients with respect to input, offset and mask; null outputs are skipped.
void deform_conv_backward(const DeformConv& p, Type type, bool tf32, const Device& device);
void deform_conv_weight(const DeformConv& p, Type type, bool tf32, const Device& device);

}  // namespace bkd
