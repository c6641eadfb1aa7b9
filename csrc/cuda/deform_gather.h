// The sampling half of a deformable convolution: kernel arguments and launchers.
#pragma once

#include "sampling.h"

namespace bkd {

// projected (image or 1, H, W, taps, channels); output and grad (image, H', W', channels). Channels are whole 16-byte
// chunks.
struct DeformGather {
  Sampling sampling;
  int taps;    // sampling.taps times the offset groups, summed over all
  int pixels;  // output pixels of all images
  int channels;
  bool shared;  // one projected image for the whole batch
  const void* projected;
  void* output;
  const void* grad;
  Accumulator grad_projected;
  SamplingGradients grad_sampling;
};

void deform_gather(const DeformGather& p, Type type, const Device& device);
// Null outputs are skipped.
void deform_gather_backward(const DeformGather& p, Type type, const Device& device);

}  // namespace bkd
