// Gradients of one sample with respect to its four neighbours, its position and its mask.
#pragma once

#include "sampling.cuh"

namespace bkd {
namespace {

// A sampling position: neighbours, bilinear weights and their derivatives.
struct Sample {
  uint32_t pixel[4];  // index over all images, or kOutside
  float weight[4], by_y[4], by_x[4];
  float mask;
};

template <class T>
__device__ __forceinline__ Sample sample_at(const Sampling& s, const OutputPixel& out, int group, int tap,
                                            bool shared_input) {
  const Corners<float> c = corners_at<T>(s, out, group, tap);
  const uint32_t base = shared_input ? 0 : out.image * s.height * s.width;
  Sample sample;
  for (int i = 0; i < 4; ++i) {
    sample.pixel[i] = pixel_from(base, c.pixel[i]);
    sample.weight[i] = c.weight[i];
    sample.by_y[i] = c.by_y[i];
    sample.by_x[i] = c.by_x[i];
  }
  sample.mask = mask_at<T>(s, out, group, tap);
  return sample;
}

__device__ __forceinline__ void add(const Accumulator& to, float scale, int64_t index, float value) {
  if (to.fixed) {
    add_atomic(to.fixed + index, static_cast<unsigned long long>(__float2ll_rn(value * scale)));
  } else {
    add_atomic(to.floating + index, value);
  }
}

// Backward of two channels of one sample. grad: with respect to the masked sample. dots: accumulates grad times the
// value of each neighbour.
template <class T>
__device__ __forceinline__ void scatter(float2 grad, const Sample& sample, const T* input, int64_t line, int channel,
                                        const Accumulator& grad_input, float scale, bool needs_dots, float (&dots)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (sample.pixel[i] == kOutside) continue;  // uniform across the warp
    const int64_t at = int64_t{sample.pixel[i]} * line + channel;
    if (needs_dots) {
      const auto value = load<Vec2<T>>(input + at);
      dots[i] += grad.x * wide(value.value[0]) + grad.y * wide(value.value[1]);
    }
    const float weight = sample.weight[i] * sample.mask;
    if (grad_input.needed() && weight != 0) {
      add(grad_input, scale, at, weight * grad.x);
      add(grad_input, scale, at + 1, weight * grad.y);
    }
  }
}

// Warp-wide: reduce dots over the lanes and store the gradients of one sample's position and mask.
__device__ __forceinline__ void store_sampling_gradients(const Sampling& s, const SamplingGradients& to, int groups,
                                                         const OutputPixel& out, int group, int tap,
                                                         const Sample& sample, const float (&dots)[4]) {
  float grad_y = 0, grad_x = 0, grad_mask = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float dot = sum_lanes(dots[i]);
    grad_mask += dot * sample.weight[i];
    grad_y += dot * sample.by_y[i];
    grad_x += dot * sample.by_x[i];
  }
  if (threadIdx.x % kWarpSize) return;
  const int64_t slot = (int64_t{out.image} * groups + group) * s.taps + tap;
  if (to.mask) store(to.mask + slot * s.pixels() + out.pixel, grad_mask);
  if (to.offset) {
    store(to.offset + 2 * slot * s.pixels() + out.pixel, grad_y * sample.mask);
    store(to.offset + (2 * slot + 1) * s.pixels() + out.pixel, grad_x * sample.mask);
  }
}

}  // namespace
}  // namespace bkd
