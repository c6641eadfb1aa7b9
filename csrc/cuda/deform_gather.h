// The sampling half of a deformable convolution: what its kernels are given, and how they are started.
#pragma once

#include "sampling.h"

namespace bkd {

// projected: (image or 1, H, W, taps, channels); output and grad: (image, H', W', channels). Channels are whole chunks
// of 16 bytes.
struct DeformGather {
  Sampling sampling;
  int taps;    // sampling.taps of each group; the groups are summed too
  int pixels;  // of all images' outputs
  int channels;
  bool shared;  // one projected image for all
  const void* projected;
  void* output;
  const void* grad;
  Accumulator grad_projected;
  MoveGradients grad_moves;
};

void deform_gather(const DeformGather& p, Type type, const Device& device);
// Those of grad_projected and grad_moves that are not null.
void deform_gather_backward(const DeformGather& p, Type type, const Device& device);

}  // namespace bkd
