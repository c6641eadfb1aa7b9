// The gradient of one sample: by the four input pixels that it read, by its position and by its mask.
#pragma once

#include "sampling.cuh"

namespace bkd {
namespace {

// What the gradient of one sample needs.
struct Spot {
  uint32_t pixel[4];  // over all images, or kOutside
  float weight[4], by_y[4], by_x[4];
  float mask;
};

template <class T>
__device__ __forceinline__ Spot spot_at(const Sampling& s, const Place& place, int group, int tap, bool shared_input) {
  const Corners<float> found = corners_at<T>(s, place, group, tap);
  const uint32_t base = shared_input ? 0 : place.image * s.height * s.width;
  Spot spot;
  for (int i = 0; i < 4; ++i) {
    spot.pixel[i] = pixel_from(base, found.pixel[i]);
    spot.weight[i] = found.weight[i];
    spot.by_y[i] = found.by_y[i];
    spot.by_x[i] = found.by_x[i];
  }
  spot.mask = mask_at<T>(s, place, group, tap);
  return spot;
}

__device__ __forceinline__ void add(const Accumulator& to, float scale, int64_t index, float value) {
  if (to.exact) {
    add_atomic(to.exact + index, static_cast<unsigned long long>(__float2ll_rn(value * scale)));
  } else {
    add_atomic(to.plain + index, value);
  }
}

// Two channels of one sample. grad: by the sample times its mask. dots: grad times each corner's value, summed by the
// caller.
template <class T>
__device__ __forceinline__ void scatter(float2 grad, const Spot& spot, const T* input, int64_t line, int channel,
                                        const Accumulator& grad_input, float scale, bool moves, float (&dots)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (spot.pixel[i] == kOutside) continue;  // the same for the whole warp
    const int64_t at = int64_t{spot.pixel[i]} * line + channel;
    if (moves) {
      const auto value = load<Both<T>>(input + at);
      dots[i] += grad.x * wide(value.first) + grad.y * wide(value.second);
    }
    const float weight = spot.weight[i] * spot.mask;
    if (grad_input.wanted() && weight != 0) {
      add(grad_input, scale, at, weight * grad.x);
      add(grad_input, scale, at + 1, weight * grad.y);
    }
  }
}

// Of a whole warp: sums the lanes' dots and writes the gradients of one sample's position and mask.
__device__ __forceinline__ void write_moves(const Sampling& s, const MoveGradients& to, int groups, const Place& place,
                                            int group, int tap, const Spot& spot, const float (&dots)[4]) {
  float by_y = 0, by_x = 0, by_mask = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float dot = sum_lanes(dots[i]);
    by_mask += dot * spot.weight[i];
    by_y += dot * spot.by_y[i];
    by_x += dot * spot.by_x[i];
  }
  if (threadIdx.x % kWarpSize) return;
  const int64_t slot = (int64_t{place.image} * groups + group) * s.taps + tap;
  if (to.mask) store(to.mask + slot * s.pixels() + place.pixel, by_mask);
  if (to.offset) {
    store(to.offset + 2 * slot * s.pixels() + place.pixel, by_y * spot.mask);
    store(to.offset + (2 * slot + 1) * s.pixels() + place.pixel, by_x * spot.mask);
  }
}

}  // namespace
}  // namespace bkd
