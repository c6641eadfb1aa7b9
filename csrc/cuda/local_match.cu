// Local matching. Several lanes share a pixel, each with 16 bytes of channels, and scan the window a few horizontal
// offsets at a time; warp shuffles reduce their sums.
#include "local_match.h"

#include "device.cuh"

namespace bkd {
namespace {

constexpr int kThreads = 256;
constexpr int kOffsets = 3;  // horizontal offsets compared at once

// Tie-breaking rank of an offset: shortest first, then row-major. It encodes the offset.
__device__ __forceinline__ int rank_of(int dy, int dx) {
  return ((dy * dy + dx * dx) << 10) | ((dy + 16) << 5) | (dx + 16);
}
__device__ __forceinline__ float vertical(int rank) { return static_cast<float>((rank >> 5 & 31) - 16); }
__device__ __forceinline__ float horizontal(int rank) { return static_cast<float>((rank & 31) - 16); }

// sums[i] += this lane's part of the squared distance to the support pixel i to the right of `first`, if valid[i].
template <class T>
__device__ __forceinline__ void compare(const LocalMatch& p, const float* own, const T* support, int64_t first,
                                        int lane, int lanes_per_pixel, const bool (&valid)[kOffsets],
                                        float (&sums)[kOffsets]) {
  constexpr int kCount = Pack<T>::kCount;
  for (int channel = lane * kCount; channel < p.channels; channel += lanes_per_pixel * kCount) {
    Pack<float> query[kCount / 4];
#pragma unroll
    for (int i = 0; i < kCount / 4; ++i) query[i] = load<Pack<float>>(own + channel + 4 * i);
#pragma unroll
    for (int offset = 0; offset < kOffsets; ++offset) {
      if (!valid[offset]) continue;
      const Pack<T> other = load<Pack<T>>(support + first + int64_t{offset} * p.channels + channel);
#pragma unroll
      for (int i = 0; i < kCount / 2; ++i) {
        const float2 x = query[i / 2].pair(i % 2), y = other.pair(i);
        sums[offset] += (x.x - y.x) * (x.x - y.x);
        sums[offset] += (x.y - y.y) * (x.y - y.y);
      }
    }
  }
}

// lanes_per_pixel: a power of 2.
template <class T>
__global__ void __launch_bounds__(kThreads, 4) local_match_kernel(const LocalMatch p, int lanes_per_pixel) {
  const int lane = threadIdx.x % lanes_per_pixel;
  const int64_t result = int64_t{blockIdx.x} * (kThreads / lanes_per_pixel) + threadIdx.x / lanes_per_pixel;
  const bool active = result < p.results();
  const int64_t pair = active ? result / p.pixels() : 0, pixel = active ? result - pair * p.pixels() : 0;
  const int y = static_cast<int>(pixel / p.width), x = static_cast<int>(pixel - int64_t{y} * p.width);
  const int64_t shot = load<int64_t>(p.shot + pair);
  const bool known = active && shot >= 0 && shot < p.images;
  const float* own = p.query + (pair / p.shots * p.pixels() + pixel) * p.channels;
  const int64_t start = (known ? shot : 0) * p.pixels() + pixel;  // support pixel at offset 0
  float best = 0;
  int rank = -1;  // no candidate yet
  for (int dy = -p.radius; dy <= p.radius; ++dy) {
    const bool row = known && y + dy >= 0 && y + dy < p.height;
    for (int dx = -p.radius; dx <= p.radius; dx += kOffsets) {
      float sums[kOffsets] = {};
      bool valid[kOffsets];
#pragma unroll
      for (int offset = 0; offset < kOffsets; ++offset) {
        valid[offset] = row && dx + offset <= p.radius && x + dx + offset >= 0 && x + dx + offset < p.width;
      }
      const int64_t first = (start + int64_t{dy} * p.width + dx) * p.channels;  // may be outside the image
      compare<T>(p, own, static_cast<const T*>(p.support), first, lane, lanes_per_pixel, valid, sums);
#pragma unroll
      for (int offset = 0; offset < kOffsets; ++offset) {
        for (int step = lanes_per_pixel / 2; step > 0; step /= 2)
          sums[offset] += __shfl_xor_sync(kAll, sums[offset], step);
        const int other = rank_of(dy, dx + offset);
        const bool better = rank < 0 || sums[offset] < best || (sums[offset] == best && other < rank);
        if (valid[offset] && sums[offset] == sums[offset] && better) {
          best = sums[offset];
          rank = other;
        }
      }
    }
  }
  if (!active || lane != 0) return;
  float* displacement = p.displacement + 2 * pair * p.pixels() + pixel;
  store(p.distance + result, rank < 0 ? nanf("") : best / static_cast<float>(p.unpadded_channels));
  store(displacement, rank < 0 ? 0.0f : vertical(rank));
  store(displacement + p.pixels(), rank < 0 ? 0.0f : horizontal(rank));
}

template <class T>
void start(const LocalMatch& p, const Device& device) {
  int lanes_per_pixel = 4;
  while (lanes_per_pixel < kWarpSize && lanes_per_pixel * Pack<T>::kCount < p.channels) lanes_per_pixel *= 2;
  launch("local_match", &local_match_kernel<T>, blocks_for(p.results(), kThreads / lanes_per_pixel), 1, 1, kThreads, 0,
         device, p, lanes_per_pixel);
}

}  // namespace

void local_match(const LocalMatch& p, Type type, const Device& device) {
  dispatch(type, [&](auto zero) { start<decltype(zero)>(p, device); });
}

}  // namespace bkd
