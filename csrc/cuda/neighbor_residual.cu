// The distance of rows from the best combination of their neighbours. A block has a row. A warp has 4 x 4 products of
// neighbours, or a part of their channels, in registers; rows are read from L1 but the first time. The distance follows
// from the products and the weights, so that the rows are not read again.
#include "neighbor_residual.h"

#include <algorithm>

#include "regression.cuh"

namespace bkd {
namespace {

constexpr int kThreads = 640;  // two warps for each of the ten tiles of 16 neighbours
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kEach = 4;  // channels of a lane at a time
constexpr int kSide = 4;  // neighbours along a tile of products
constexpr int kTile = kSide * kSide;

struct Shared {
  System system;
  float gram[kMaxNeighbors][kMaxNeighbors];
  float part[kWarps][kTile];
  int64_t start[kMaxNeighbors];  // -1: not in the bank, or no neighbour
};

// Load channels of a neighbour, minus the query; 0 where it is not there.
template <class T>
__device__ __forceinline__ void load_neighbor(const Shared& shared, const T* bank, int number, int channel,
                                              const float (&center)[kEach], float (&difference)[kEach]) {
  const int64_t start = shared.start[number];
#pragma unroll
  for (int c = 0; c < kEach; ++c) difference[c] = 0;
  if (start >= 0) load_difference(bank + start + channel, center, difference);
}

// slices: warps that share a tile.
template <class T>
__global__ void __launch_bounds__(kThreads) neighbor_residual_kernel(const NeighborResidual p, int slices) {
  BKD_SHARED(Shared, shared);
  const int thread = threadIdx.x, lane = thread % kWarpSize, warp = thread / kWarpSize, count = p.neighbors;
  const int64_t row = blockIdx.x;
  const T* bank = static_cast<const T*>(p.bank);
  const float* query = p.query + row * p.channels;
  bool missing = false;
  if (thread < kMaxNeighbors) {
    const int64_t index = thread < count ? load<int64_t>(p.neighbor + row * count + thread) : -1;
    const bool exists = index >= 0 && index < p.bank_rows;
    missing = thread < count && !exists;
    shared.start[thread] = exists ? index * p.channels : -1;
  }
  missing = __syncthreads_or(missing);
  const int sides = (count + kSide - 1) / kSide, tiles = sides * (sides + 1) / 2, at_once = kWarps / slices;
  for (int first = 0; first < tiles; first += at_once) {
    const int tile = first + warp / slices;
    int below = 0;  // the tile's row among the tiles of the lower triangle
    while ((below + 1) * (below + 2) / 2 <= tile) ++below;
    const int beside = tile - below * (below + 1) / 2;
    float product[kSide][kSide] = {};
    if (tile < tiles && warp < at_once * slices) {
      for (int channel = (warp % slices * kWarpSize + lane) * kEach; channel < p.channels;
           channel += slices * kWarpSize * kEach) {
        float center[kEach], row_of[kSide][kEach];
        load_center(query + channel, center);
#pragma unroll
        for (int i = 0; i < kSide; ++i) load_neighbor(shared, bank, kSide * below + i, channel, center, row_of[i]);
#pragma unroll
        for (int j = 0; j < kSide; ++j) {
          float other[kEach];
          load_neighbor(shared, bank, kSide * beside + j, channel, center, other);
#pragma unroll
          for (int i = 0; i < kSide; ++i) {
#pragma unroll
            for (int c = 0; c < kEach; ++c) product[i][j] += row_of[i][c] * other[c];
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      const float sum = sum_lanes(product[i / kSide][i % kSide]);
      if (lane == 0) shared.part[warp][i] = sum;
    }
    __syncthreads();
    // Thread i of a tile's first warp adds up what all its warps have.
    if (lane < kTile && warp % slices == 0 && tile < tiles && warp < at_once * slices) {
      const int i = kSide * below + lane / kSide, j = kSide * beside + lane % kSide;
      float sum = 0;
      for (int slice = 0; slice < slices; ++slice) sum += shared.part[warp + slice][lane];
      if (i < count && j < count) {
        shared.gram[i][j] = shared.gram[j][i] = sum;
        shared.system.gram[i][j] = shared.system.gram[j][i] = sum;
      }
    }
    __syncthreads();
  }
  const float total = solve<kThreads>(shared.system, count, p.ridge);
  if (warp == 0) {  // weights sum to one: the squared distance is that of the weighted sum of differences
    float sum = 0;
    for (int i = lane; i < count; i += kWarpSize) {
      float own = 0;
      for (int j = 0; j < count; ++j) own += shared.system.weight[j] / total * shared.gram[i][j];
      sum += shared.system.weight[i] / total * own;
    }
    sum = sum_lanes(sum);
    sum = sum < 0 ? 0 : sum;  // rounded; NaN stays
    if (lane == 0) store(p.residual + row, missing ? nanf("") : sum / static_cast<float>(p.unpadded_channels));
  }
  for (int i = thread; i < p.values; i += kThreads) {
    float sum = missing ? nanf("") : 0;
    for (int j = 0; j < count; ++j) {
      const int64_t start = shared.start[j];
      if (start >= 0) sum += load<float>(p.value + start / p.channels * p.values + i);
    }
    store(p.mean + row * p.values + i, sum / static_cast<float>(count));
  }
}

template <class T>
void start(const NeighborResidual& p, const Device& device) {
  const int sides = (p.neighbors + kSide - 1) / kSide;
  const int slices = std::max(1, kWarps / (sides * (sides + 1) / 2));
  launch("neighbor_residual", &neighbor_residual_kernel<T>, p.rows, 1, 1, kThreads, 0, device, p, slices);
}

}  // namespace

void neighbor_residual(const NeighborResidual& p, Type type, const Device& device) {
  dispatch(type, [&](auto zero) { start<decltype(zero)>(p, device); });
}

}  // namespace bkd
