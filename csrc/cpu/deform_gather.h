// Modulated deformable sampling of products with the weights: the arguments of its kernels.
#pragma once

#include "kernel.h"

namespace bkd {

// Sampling of an input that is a product with the weights already: projected (B, H, W, T, C), output (N, Ho, Wo, C).
template <class T>
struct DeformGather {
  Parallel parallel;
  int64_t threads;
  int64_t batch, shared, taps, channels, height, width, out_height, out_width;
  int64_t kernel[2], stride[2], padding[2], dilation[2];
  const T* projected;
  const T* offset;
  const T* mask;
  T* output;
  const T* grad;  // (N, Ho, Wo, C)
  T* grad_projected;
  T* grad_offset;
  T* grad_mask;

  BKD_INLINE int64_t slots() const { return taps; }  // positions that a pixel samples
  BKD_INLINE int64_t pixels() const { return out_height * out_width; }
  BKD_INLINE const T* image(int64_t n) const { return projected + (shared ? 0 : n * height * width * taps * channels); }
};

// The forward of bfloat16, of which these are projected and output; offset and mask are the float32 ones.
struct BFloatDeformGather : DeformGather<float> {
  const BFloat* bfloat_projected;
  BFloat* bfloat_output;
  BKD_INLINE const BFloat* bfloat_image(int64_t n) const {
    return bfloat_projected + (shared ? 0 : n * height * width * taps * channels);
  }
};

BKD_DECLARE_KERNEL(deform_gather, DeformGather)
BKD_DECLARE_KERNEL(deform_gather_backward, DeformGather)
BKD_DECLARE_BFLOAT_KERNEL(deform_gather_bfloat, BFloatDeformGather)

}  // namespace bkd
