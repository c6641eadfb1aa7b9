// Memory-bound sampling and summation. Forward: a thread accumulates 16 bytes of channels of one pixel over all taps.
// Backward: one warp per pixel and tap.
#include "deform_gather.h"

#include <algorithm>

#include "scatter.cuh"

namespace bkd {
namespace {

constexpr int kThreads = 256;
constexpr int kTaps = 9;  // taps per neighbour table
constexpr int kMaxPixels = 64;

struct Taps {
  Neighbors<kMaxPixels> neighbors[kTaps];
};

// chunks: 16-byte chunks per pixel and block; a power of 2, at least 4.
template <class T>
__global__ void __launch_bounds__(kThreads) deform_gather_kernel(const DeformGather p, int chunks) {
  BKD_SHARED(Taps, shared);
  const T* projected = static_cast<const T*>(p.projected);
  const Sampling& s = p.sampling;
  const int pixels = kThreads / chunks, first_pixel = blockIdx.x * pixels, thread = threadIdx.x;
  const int row = thread / chunks, channel = (blockIdx.y * chunks + thread % chunks) * Pack<T>::kCount;
  const bool active = first_pixel + row < p.pixels && channel < p.channels;
  constexpr int kPairs = Pack<T>::kCount / 2;
  float2 sums[kPairs] = {};
  for (int first = 0; first < p.taps; first += kTaps) {
    const int count = min(kTaps, p.taps - first);
    if (first) __syncthreads();
    for (int i = thread; i < count * pixels; i += kThreads) {
      const int slot = i / pixels, index = i - slot * pixels, pixel = first_pixel + index;
      const int group = (first + slot) / s.taps, tap = first + slot - group * s.taps;
      shared.neighbors[slot].template compute<T>(index, s, pixel, pixel < p.pixels, group, tap, p.shared);
    }
    __syncthreads();
#pragma unroll 1  // to save registers
    for (int slot = 0; slot < (active ? count : 0); ++slot) {
      const uint4 pixel = load_shared<uint4>(&shared.neighbors[slot].pixel[row]);
      const float4 weight = load_shared<float4>(&shared.neighbors[slot].weight[row]);
      CornerValues<T> corners;
      corners.fetch(projected + (first + slot) * p.channels + channel, pixel, p.taps * p.channels * sizeof(T));
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        const float2 value = corners.sum(i, weight);
        sums[i] = make_float2(sums[i].x + value.x, sums[i].y + value.y);
      }
    }
  }
  if (!active) return;
  Pack<T> result;
#pragma unroll
  for (int i = 0; i < kPairs; ++i) result.set_pair(i, sums[i]);
  store(static_cast<T*>(p.output) + int64_t{first_pixel + row} * p.channels + channel, result);
}

template <class T, bool kExact>
__global__ void __launch_bounds__(kThreads, 3) deform_gather_backward_kernel(const DeformGather p) {
  using Lane = LaneChannels<kExact>;
  const Sampling& s = p.sampling;
  const int64_t index = int64_t{blockIdx.x} * (kThreads / kWarpSize) + threadIdx.x / kWarpSize;
  if (index >= p.pixels) return;  // uniform across the warp
  const OutputPixel out = output_pixel(s, static_cast<int>(index));
  const T* grad = static_cast<const T*>(p.grad) + index * p.channels;
  const float scale = kExact ? load<float>(p.grad_projected.scale) : 1;
  for (int slot = blockIdx.y; slot < p.taps; slot += gridDim.y) {
    const int group = slot / s.taps, tap = slot - group * s.taps;
    const Sample sample = sample_at<T>(s, out, group, tap, p.shared);
    float dots[2] = {};
    for (int channel = 0; channel < p.channels; channel += kTileChannels) {
      float own[kLaneChannels];
      Lane::load_tile(own, grad + channel, p.channels - channel);
      scatter<kExact>(own, sample, static_cast<const T*>(p.projected), p.taps * p.channels, slot * p.channels + channel,
                      p.channels - channel, p.grad_projected, scale, p.grad_sampling.needed(), dots);
    }
    if (p.grad_sampling.needed())
      store_sampling_gradients(s, p.grad_sampling, p.taps / s.taps, out, group, tap, sample, dots);
  }
}

template <class T>
void start(const DeformGather& p, const Device& device) {
  int chunks = 4;
  while (chunks < 16 && chunks * Pack<T>::kCount < p.channels) chunks *= 2;
  launch("deform_gather", &deform_gather_kernel<T>, blocks_for(p.pixels, kThreads / chunks),
         blocks_for(p.channels, chunks * Pack<T>::kCount), 1, kThreads, 0, device, p, chunks);
}

template <class T>
void start_backward(const DeformGather& p, const Device& device) {
  const auto kernel =
      p.grad_projected.fixed ? &deform_gather_backward_kernel<T, true> : &deform_gather_backward_kernel<T, false>;
  launch("deform_gather_backward", kernel, blocks_for(p.pixels, kThreads / kWarpSize), std::min(p.taps, kMaxGrid), 1,
         kThreads, 0, device, p);
}

}  // namespace

void deform_gather(const DeformGather& p, Type type, const Device& device) {
  dispatch(type, [&](auto zero) { start<decltype(zero)>(p, device); });
}

void deform_gather_backward(const DeformGather& p, Type type, const Device& device) {
  dispatch(type, [&](auto zero) { start_backward<decltype(zero)>(p, device); });
}

}  // namespace bkd
