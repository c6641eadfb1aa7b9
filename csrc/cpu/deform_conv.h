// Modulated deformable convolution: the arguments of its kernels.
#pragma once

#include "kernel.h"

namespace bkd {

// Modulated deformable convolution. Images are channels-last, (N, H, W, C).
// offset (N, 2 G K, Ho, Wo) and mask (N, G K, Ho, Wo) or null, contiguous.
template <class T>
struct DeformConv {
  Parallel parallel;
  int64_t threads;
  int64_t batch, channels, height, width;
  int64_t outputs, out_height, out_width, groups, offset_groups;
  int64_t kernel[2], stride[2], padding[2], dilation[2];
  const T* input;
  const T* offset;
  const T* mask;
  const T* weight;  // (O, C / groups, kh, kw), contiguous
  const T* bias;    // (O) or null
  // The output, and its gradient in the backward: strides of channels and pixels, one of which is 1.
  T* output;
  const T* grad;
  int64_t output_channel_stride, output_pixel_stride;
  // The backward's results; null where they are not needed.
  T* grad_input;
  T* grad_offset;
  T* grad_mask;
  T* grad_weight;

  BKD_INLINE int64_t taps() const { return kernel[0] * kernel[1]; }
  BKD_INLINE int64_t slots() const { return offset_groups * taps(); }  // positions that a pixel samples
  BKD_INLINE int64_t pixels() const { return out_height * out_width; }
  BKD_INLINE const T* image(int64_t n) const { return input + n * height * width * channels; }
};

// The forward of bfloat16: offset, mask and bias are the float32 ones; input, weight and output these.
struct BFloatDeformConv : DeformConv<float> {
  const BFloat* bfloat_input;
  const BFloat* bfloat_weight;
  BFloat* bfloat_output;
  BKD_INLINE const BFloat* bfloat_image(int64_t n) const { return bfloat_input + n * height * width * channels; }
};

BKD_DECLARE_KERNEL(deform_conv, DeformConv)
BKD_DECLARE_KERNEL(deform_conv_backward, DeformConv)
BKD_DECLARE_BFLOAT_KERNEL(deform_conv_bfloat, BFloatDeformConv)

}  // namespace bkd
