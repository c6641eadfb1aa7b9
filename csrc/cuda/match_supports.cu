// Matching and combination of supports. A block has a few pixels: its lanes search all shots for them, and then a warp
// has a pixel, selects its nearest matches and combines them. What it reads then was read just before by the search.
#include "match_supports.h"

#include "matching.cuh"
#include "regression.cuh"

namespace bkd {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kMostPixels = kWarps;  // of a block
constexpr int kEach = 4;             // channels of a lane at a time
static_assert(kMaxMatchedShots == 2 * kWarpSize, "a lane ranks two shots");

struct Found {
  float distance[kMostPixels][kMaxMatchedShots];
  int rank[kMostPixels][kMaxMatchedShots];
};

// Orders shots by distance, NaN last, ties by shot. Distances are not negative, so that their bits are in order.
__device__ __forceinline__ unsigned long long key_of(float distance, int shot) {
  const uint32_t bits = distance != distance ? 0x7fffffffu : static_cast<uint32_t>(__float_as_int(distance));
  return static_cast<unsigned long long>(bits) << 32 | static_cast<uint32_t>(shot);
}

__device__ __forceinline__ unsigned long long smallest(unsigned long long own) {
#pragma unroll
  for (int step = kWarpSize / 2; step > 0; step /= 2) {
    const unsigned long long other = __shfl_xor_sync(kAll, own, step);
    own = other < own ? other : own;
  }
  return own;
}

// pixels: of a block.
template <class T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 2 : 3)
    match_supports_kernel(const __grid_constant__ MatchSupports p, int pixels) {
  BKD_SHARED(Found, found);
  int64_t block = blockIdx.x;
  int number = 0;
  while (block >= p.view[number].blocks) block -= p.view[number++].blocks;
  const MatchSupports::View& view = p.view[number];
  const int64_t plane = view.pixels(), first = block * pixels;
  const int count = static_cast<int>(min(int64_t{pixels}, p.queries * plane - first));
  const T* support = static_cast<const T*>(view.support);
  const int lanes = view.lanes, lane_of_pixel = threadIdx.x % lanes;
  for (int start = 0; start < count * p.shots; start += kThreads / lanes) {
    const int each = start + threadIdx.x / lanes;
    const bool active = each < count * p.shots;
    const int own = active ? each / p.shots : 0, number_of_shot = active ? each - own * p.shots : 0;
    const int64_t query = (first + own) / plane, pixel = first + own - query * plane;
    const int y = static_cast<int>(pixel / view.width), x = static_cast<int>(pixel - int64_t{y} * view.width);
    const int64_t shot = load<int64_t>(p.shot + query * p.shots + number_of_shot);
    const bool known = active && shot >= 0 && shot < p.images;
    const Nearest best = search<T>(view, view.query + (first + own) * view.channels, (known ? shot : 0) * plane + pixel,
                                   known, y, x, lane_of_pixel, lanes);
    if (!active || lane_of_pixel != 0) continue;
    const float distance = best.rank < 0 ? nanf("") : best.sum / static_cast<float>(view.unpadded_channels);
    store_shared(&found.distance[own][number_of_shot], distance);
    store_shared(&found.rank[own][number_of_shot], best.rank);
  }
  __syncthreads();
  const int own = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  if (own >= count) return;  // uniform across the warp
  const int64_t query = (first + own) / plane, pixel = first + own - query * plane;
  unsigned long long key[2];
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int shot = e * kWarpSize + lane;
    key[e] = shot < p.shots ? key_of(load_shared<float>(&found.distance[own][shot]), shot) : ~0ull;
  }
  int64_t start[kFew];
#pragma unroll
  for (int i = 0; i < kFew; ++i) {
    start[i] = -1;
    if (i >= p.neighbors) continue;
    const unsigned long long nearest = smallest(key[0] < key[1] ? key[0] : key[1]);
#pragma unroll
    for (int e = 0; e < 2; ++e) key[e] = key[e] == nearest ? ~0ull : key[e];
    const int number_of_shot = static_cast<int>(nearest & 0xffffffffu);
    const int rank = load_shared<int>(&found.rank[own][number_of_shot]);
    const int64_t shot = load<int64_t>(p.shot + query * p.shots + number_of_shot);
    const int64_t moved = rank < 0 ? 0 : int64_t{vertical(rank)} * view.width + horizontal(rank);
    if (shot >= 0 && shot < p.images) start[i] = (shot * plane + pixel + moved) * view.channels;
  }
  const float* center = view.query + (first + own) * view.channels;
  float* output = view.output + (first + own) * view.channels;
  if (p.neighbors > 1) {
    combine<T, kEach>(center, support, start, p.neighbors, p.ridge, view.channels, lane, output);
    return;
  }
  for (int channel = lane * kEach; channel < view.channels; channel += kWarpSize * kEach) {
    float value[kEach];
    if (start[0] < 0) {
#pragma unroll
      for (int c = 0; c < kEach; ++c) value[c] = nanf("");
    } else {
      const Vec<T, kEach> some = load<Vec<T, kEach>>(support + start[0] + channel);
#pragma unroll
      for (int c = 0; c < kEach; ++c) value[c] = wide(some.value[c]);
    }
    store_row(output + channel, value);
  }
}

template <class T>
void start(MatchSupports& p, const Device& device) {
  int64_t all = 0;
  for (int i = 0; i < p.views; ++i) all += p.queries * p.view[i].pixels();
  // A warp combines the matches of a pixel: as many pixels as warps, unless the device would have too few blocks.
  int pixels = kMostPixels;
  while (pixels > 1 && blocks_for(all, pixels) < 8 * int64_t{device.multiprocessors}) pixels /= 2;
  int64_t blocks = 0;
  for (int i = 0; i < p.views; ++i) {
    p.view[i].blocks = blocks_for(p.queries * p.view[i].pixels(), pixels);
    p.view[i].lanes = lanes_for<T>(p.view[i].channels);
    blocks += p.view[i].blocks;
  }
  launch("match_supports", &match_supports_kernel<T>, blocks, 1, 1, kThreads, 0, device, p, pixels);
}

}  // namespace

void match_supports(MatchSupports p, Type type, const Device& device) {
  dispatch(type, [&](auto zero) { start<decltype(zero)>(p, device); });
}

}  // namespace bkd
