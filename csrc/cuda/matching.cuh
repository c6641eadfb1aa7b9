// The search of local matching: several lanes share a pixel, each with 16 bytes of channels, and scan the window a few
// horizontal offsets at a time; warp shuffles reduce their sums.
#pragma once

#include "device.cuh"

namespace bkd {
namespace {

constexpr int kOffsets = 3;  // horizontal offsets compared at once

// Tie-breaking rank of an offset: shortest first, then row-major. It encodes the offset.
__device__ __forceinline__ int rank_of(int dy, int dx) {
  return ((dy * dy + dx * dx) << 10) | ((dy + 16) << 5) | (dx + 16);
}
__device__ __forceinline__ int vertical(int rank) { return (rank >> 5 & 31) - 16; }
__device__ __forceinline__ int horizontal(int rank) { return (rank & 31) - 16; }

// sums[i] += this lane's part of the squared distance to the support pixel i to the right of `first`, if valid[i].
template <class T, class P>
__device__ __forceinline__ void compare(const P& p, const float* own, const T* support, int64_t first, int lane,
                                        int lanes_per_pixel, const bool (&valid)[kOffsets], float (&sums)[kOffsets]) {
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

// The nearest pixel of a support image in the window around (y, x): the sum of its squared differences, and the rank of
// its offset. -1: there is none.
struct Nearest {
  float sum;
  int rank;
};

// own: the query's pixel; start: the support's at offset 0, in pixels, read if `known`. All lanes of the warp call it;
// those of a pixel, of which `lane` is one, get the same result.
template <class T, class P>
__device__ __forceinline__ Nearest search(const P& p, const float* own, int64_t start, bool known, int y, int x,
                                          int lane, int lanes_per_pixel) {
  float best = 0;
  int rank = -1;
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
  return {best, rank};
}

// How many lanes share a pixel: a power of 2.
template <class T>
int lanes_for(int channels) {
  int lanes = 4;
  while (lanes < kWarpSize && lanes * Pack<T>::kCount < channels) lanes *= 2;
  return lanes;
}

}  // namespace
}  // namespace bkd
