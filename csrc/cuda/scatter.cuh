// Gradients of one sample with respect to its four neighbours, its position and its mask. A half warp takes the
// channels of one neighbour; a lane has kLaneChannels of a tile of kTileChannels.
#pragma once

#include "sampling.cuh"

namespace bkd {
namespace {

constexpr int kLaneChannels = 4, kHalfWarp = kWarpSize / 2, kTileChannels = kHalfWarp * kLaneChannels;

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

// Where 16 bytes are added at once (9.0) a lane has adjacent channels; elsewhere lanes have, so that each addition of a
// half warp fills whole sectors.
template <bool kExact>
struct LaneChannels {
  static constexpr bool kAdjacent = kHasVectorAtomics && !kExact;

  // The lane's channel `i` of the tile.
  static __device__ __forceinline__ int at(int i) {
    const int lane = threadIdx.x % kHalfWarp;
    return kAdjacent ? lane * kLaneChannels + i : lane + i * kHalfWarp;
  }
  // Load the lane's channels of a tile; those from `count` on (whole chunks of 16 bytes) are 0.
  template <class T>
  static __device__ __forceinline__ void load_tile(float (&value)[kLaneChannels], const T* tile, int count) {
    Vec<T, kLaneChannels> own{};
    if constexpr (kAdjacent) {
      if (at(0) < count) own = load<Vec<T, kLaneChannels>>(tile + at(0));
    } else {
#pragma unroll
      for (int i = 0; i < kLaneChannels; ++i)
        if (at(i) < count) own.value[i] = load<T>(tile + at(i));
    }
#pragma unroll
    for (int i = 0; i < kLaneChannels; ++i) value[i] = wide(own.value[i]);
  }
  // Add `weight` times the lane's channels to a tile.
  static __device__ __forceinline__ void add_tile(const Accumulator& to, float scale, int64_t tile, float weight,
                                                  const float (&value)[kLaneChannels], int count) {
    if constexpr (kAdjacent) {
      if (at(0) < count) {
        add_atomic(to.floating + tile + at(0),
                   make_float4(weight * value[0], weight * value[1], weight * value[2], weight * value[3]));
      }
    } else {
#pragma unroll
      for (int i = 0; i < kLaneChannels; ++i) {
        if (at(i) >= count) continue;
        if constexpr (kExact) {
          const long long fixed = __float2ll_rn(weight * value[i] * scale);
          add_atomic(to.fixed + tile + at(i), static_cast<unsigned long long>(fixed));
        } else {
          add_atomic(to.floating + tile + at(i), weight * value[i]);
        }
      }
    }
  }
};

// Of the neighbours 2 i and 2 i + 1 the one of this half of the warp. A choice, so that registers need no index.
template <class V>
__device__ __forceinline__ V of_half(const V (&value)[4], int i) {
  return threadIdx.x % kWarpSize < kHalfWarp ? value[2 * i] : value[2 * i + 1];
}

// Backward of one tile of a sample: `count` channels from `channel`. grad: a lane's gradients with respect to the
// masked sample, the same in both halves of the warp. dots: accumulates grad times the values of the half's two
// neighbours.
template <bool kExact, class T>
__device__ __forceinline__ void scatter(const float (&grad)[kLaneChannels], const Sample& sample, const T* input,
                                        uint32_t line, int channel, int count, const Accumulator& grad_input,
                                        float scale, bool needs_dots, float (&dots)[2]) {
  using Lane = LaneChannels<kExact>;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t pixel = of_half(sample.pixel, i);
    if (pixel == kOutside) continue;  // uniform across the half warp
    const int64_t at = static_cast<int64_t>(uint64_t{pixel} * line) + channel;
    if (needs_dots) {
      float value[kLaneChannels];
      Lane::load_tile(value, input + at, count);
#pragma unroll
      for (int k = 0; k < kLaneChannels; ++k) dots[i] += grad[k] * value[k];
    }
    const float weight = of_half(sample.weight, i) * sample.mask;
    if (grad_input.needed() && weight != 0) Lane::add_tile(grad_input, scale, at, weight, grad, count);
  }
}

// Warp-wide: reduce dots over the lanes and store the gradients of one sample's position and mask.
__device__ __forceinline__ void store_sampling_gradients(const Sampling& s, const SamplingGradients& to, int groups,
                                                         const OutputPixel& out, int group, int tap,
                                                         const Sample& sample, const float (&dots)[2]) {
  float grad_y = 0, grad_x = 0, grad_mask = 0;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float dot = sum_lanes<kHalfWarp>(dots[i]);
    grad_mask += dot * of_half(sample.weight, i);
    grad_y += dot * of_half(sample.by_y, i);
    grad_x += dot * of_half(sample.by_x, i);
  }
  grad_mask += __shfl_xor_sync(kAll, grad_mask, kHalfWarp);
  grad_y += __shfl_xor_sync(kAll, grad_y, kHalfWarp);
  grad_x += __shfl_xor_sync(kAll, grad_x, kHalfWarp);
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
