// Matching in a window. Some lanes of a warp share a pixel, 16 bytes of a support's channels each, and go over the
// window a few moves at a time; their sums meet by exchanges.
#include "local_match.h"

#include "device.cuh"

namespace bkd {
namespace {

constexpr int kThreads = 256;
constexpr int kMoves = 3;  // to the side, that are compared together

// A move's rank among those of equal distance: the shortest, then in row-major order. The move can be read from it.
__device__ __forceinline__ int rank_of(int dy, int dx) {
  return ((dy * dy + dx * dx) << 10) | ((dy + 16) << 5) | (dx + 16);
}
__device__ __forceinline__ float vertical(int rank) { return static_cast<float>((rank >> 5 & 31) - 16); }
__device__ __forceinline__ float horizontal(int rank) { return static_cast<float>((rank & 31) - 16); }

// sums[i] = the lane's part of the squared distance to the pixel i to the right of the `first` one, where there is one.
template <class T>
__device__ __forceinline__ void compare(const LocalMatch& p, const float* own, const T* support, int64_t first,
                                        int lane, int sharers, const bool (&there)[kMoves], float (&sums)[kMoves]) {
  constexpr int kCount = Pack<T>::kCount;
  for (int channel = lane * kCount; channel < p.channels; channel += sharers * kCount) {
    Pack<float> query[kCount / 4];
#pragma unroll
    for (int i = 0; i < kCount / 4; ++i) query[i] = load<Pack<float>>(own + channel + 4 * i);
#pragma unroll
    for (int move = 0; move < kMoves; ++move) {
      if (!there[move]) continue;
      const Pack<T> other = load<Pack<T>>(support + first + int64_t{move} * p.channels + channel);
#pragma unroll
      for (int i = 0; i < kCount / 2; ++i) {
        const float2 x = query[i / 2].pair(i % 2), y = other.pair(i);
        sums[move] += (x.x - y.x) * (x.x - y.x);
        sums[move] += (x.y - y.y) * (x.y - y.y);
      }
    }
  }
}

// sharers: lanes of a pixel, a power of 2.
template <class T>
__global__ void __launch_bounds__(kThreads, 4) local_match_kernel(const LocalMatch p, int sharers) {
  const int lane = threadIdx.x % sharers;
  const int64_t result = int64_t{blockIdx.x} * (kThreads / sharers) + threadIdx.x / sharers;
  const bool mine = result < p.results();
  const int64_t pair = mine ? result / p.pixels() : 0, pixel = mine ? result - pair * p.pixels() : 0;
  const int y = static_cast<int>(pixel / p.width), x = static_cast<int>(pixel - int64_t{y} * p.width);
  const int64_t shot = load<int64_t>(p.shot + pair);
  const bool known = mine && shot >= 0 && shot < p.images;
  const float* own = p.query + (pair / p.shots * p.pixels() + pixel) * p.channels;
  const int64_t start = (known ? shot : 0) * p.pixels() + pixel;  // where the support's pixel of no move is
  float least = 0;
  int rank = -1;  // of nothing yet
  for (int dy = -p.radius; dy <= p.radius; ++dy) {
    const bool row = known && y + dy >= 0 && y + dy < p.height;
    for (int dx = -p.radius; dx <= p.radius; dx += kMoves) {
      float sums[kMoves] = {};
      bool there[kMoves];
#pragma unroll
      for (int move = 0; move < kMoves; ++move) {
        there[move] = row && dx + move <= p.radius && x + dx + move >= 0 && x + dx + move < p.width;
      }
      const int64_t first = (start + int64_t{dy} * p.width + dx) * p.channels;  // of a pixel that need not be there
      compare<T>(p, own, static_cast<const T*>(p.support), first, lane, sharers, there, sums);
#pragma unroll
      for (int move = 0; move < kMoves; ++move) {
        for (int step = sharers / 2; step > 0; step /= 2) sums[move] += __shfl_xor_sync(kAll, sums[move], step);
        const int other = rank_of(dy, dx + move);
        const bool better = rank < 0 || sums[move] < least || (sums[move] == least && other < rank);
        if (there[move] && sums[move] == sums[move] && better) {
          least = sums[move];
          rank = other;
        }
      }
    }
  }
  if (!mine || lane != 0) return;
  float* displacement = p.displacement + 2 * pair * p.pixels() + pixel;
  store(p.distance + result, rank < 0 ? nanf("") : least / static_cast<float>(p.own));
  store(displacement, rank < 0 ? 0.0f : vertical(rank));
  store(displacement + p.pixels(), rank < 0 ? 0.0f : horizontal(rank));
}

template <class T>
void start(const LocalMatch& p, const Device& device) {
  int sharers = 4;
  while (sharers < kWarpSize && sharers * Pack<T>::kCount < p.channels) sharers *= 2;
  launch("local_match", &local_match_kernel<T>, blocks_for(p.results(), kThreads / sharers), 1, 1, kThreads, 0, device,
         p, sharers);
}

}  // namespace

void local_match(const LocalMatch& p, Type type, const Device& device) {
  by_type(type, [&](auto zero) { start<decltype(zero)>(p, device); });
}

}  // namespace bkd
