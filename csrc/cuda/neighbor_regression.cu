// Rows as linear combinations of their neighbours. Few neighbours: one warp per row, the linear system in registers.
// Many: one block per row, the system in shared memory.
#include "neighbor_regression.h"

#include "regression.cuh"

namespace bkd {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;

// Offset of a neighbour's row in the bank, or -1.
__device__ __forceinline__ int64_t start_of(const NeighborRegression& p, int64_t row, int neighbor) {
  const int64_t index = load<int64_t>(p.neighbor + row * p.neighbors + neighbor);
  return index >= 0 && index < p.bank_rows ? index * p.channels : -1;
}

template <class T>
__global__ void __launch_bounds__(kThreads) few_neighbors_kernel(const NeighborRegression p) {
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpSize;
  if (row >= p.rows) return;  // uniform across the warp
  int64_t start[kFew];
#pragma unroll
  for (int i = 0; i < kFew; ++i) start[i] = i < p.neighbors ? start_of(p, row, i) : -1;
  combine<T, Pack<T>::kCount>(p.query + row * p.channels, static_cast<const T*>(p.bank), start, p.neighbors, p.ridge,
                              p.channels, threadIdx.x % kWarpSize, p.output + row * p.channels);
}

struct Many {
  System system;
  int64_t start[kMaxNeighbors];
};

template <class T>
__global__ void __launch_bounds__(kThreads, 4) many_neighbors_kernel(const NeighborRegression p) {
  constexpr int kCount = Pack<T>::kCount;
  BKD_SHARED(Many, many);
  System& system = many.system;
  const int thread = threadIdx.x, lane = thread % kWarpSize, count = p.neighbors;
  const int64_t row = blockIdx.x;
  const T* bank = static_cast<const T*>(p.bank);
  const float* query = p.query + row * p.channels;
  for (int i = thread; i < count; i += kThreads) many.start[i] = start_of(p, row, i);
  __syncthreads();
  for (int pair = thread / kWarpSize; pair < count * count; pair += kWarps) {
    const int i = pair / count, j = pair % count;
    if (j > i) continue;
    const int64_t first = many.start[i], second = many.start[j];
    float sum = first < 0 || second < 0 ? nanf("") : 0;
    for (int channel = lane * kCount; channel < p.channels; channel += kWarpSize * kCount) {
      float center[kCount], one[kCount] = {}, other[kCount] = {};
      load_center(query + channel, center);
      if (first >= 0) load_difference(bank + first + channel, center, one);
      if (second >= 0) load_difference(bank + second + channel, center, other);
#pragma unroll
      for (int c = 0; c < kCount; ++c) sum += one[c] * other[c];
    }
    sum = sum_lanes(sum);
    if (lane == 0) system.gram[i][j] = system.gram[j][i] = sum;
  }
  __syncthreads();
  const float sum = solve<kThreads>(system, count, p.ridge);
  for (int channel = thread * kCount; channel < p.channels; channel += kThreads * kCount) {
    float center[kCount], difference[kCount], total[kCount];
    load_center(query + channel, center);
#pragma unroll
    for (int c = 0; c < kCount; ++c) total[c] = center[c];
    for (int i = 0; i < count; ++i) {
      const float weight = system.weight[i] / sum;
      if (many.start[i] >= 0) {
        load_difference(bank + many.start[i] + channel, center, difference);
      } else {
#pragma unroll
        for (int c = 0; c < kCount; ++c) difference[c] = nanf("");
      }
#pragma unroll
      for (int c = 0; c < kCount; ++c) total[c] += weight * difference[c];
    }
    store_row(p.output + row * p.channels + channel, total);
  }
}

template <class T>
void start(const NeighborRegression& p, const Device& device) {
  // With few rows, one block per row keeps more multiprocessors busy.
  if (p.neighbors > kFew || p.rows < device.multiprocessors) {
    launch("neighbor_regression", &many_neighbors_kernel<T>, p.rows, 1, 1, kThreads, 0, device, p);
  } else {
    launch("neighbor_regression", &few_neighbors_kernel<T>, blocks_for(p.rows, kWarps), 1, 1, kThreads, 0, device, p);
  }
}

}  // namespace

void neighbor_regression(const NeighborRegression& p, Type type, const Device& device) {
  dispatch(type, [&](auto zero) { start<decltype(zero)>(p, device); });
}

}  // namespace bkd
