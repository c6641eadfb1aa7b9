// Rows as linear combinations of their neighbours. Few neighbours: one warp per row, the linear system in registers.
// Many: one block per row, the system in shared memory.
#include "neighbor_regression.h"

#include "device.cuh"

namespace bkd {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kFew = 6;  // max neighbours with one warp per row
constexpr int kPairs = kFew * (kFew + 1) / 2;

// Offset of a neighbour's row in the bank, or -1.
__device__ __forceinline__ int64_t start_of(const NeighborRegression& p, int64_t row, int neighbor) {
  const int64_t index = load<int64_t>(p.neighbor + row * p.neighbors + neighbor);
  return index >= 0 && index < p.bank_rows ? index * p.channels : -1;
}

// Load Pack<T>::kCount channels of the query.
template <class T>
__device__ __forceinline__ void load_center(const float* from, float (&center)[Pack<T>::kCount]) {
#pragma unroll
  for (int i = 0; i < Pack<T>::kCount; i += 4) {
    const Pack<float> four = load<Pack<float>>(from + i);
#pragma unroll
    for (int j = 0; j < 4; ++j) center[i + j] = four.value[j];
  }
}

// Load the same channels of a neighbour, minus the query.
template <class T>
__device__ __forceinline__ void load_difference(const T* from, const float (&center)[Pack<T>::kCount],
                                                float (&difference)[Pack<T>::kCount]) {
  const Pack<T> pack = load<Pack<T>>(from);
#pragma unroll
  for (int i = 0; i < Pack<T>::kCount / 2; ++i) {
    const float2 two = pack.pair(i);
    difference[2 * i] = two.x - center[2 * i], difference[2 * i + 1] = two.y - center[2 * i + 1];
  }
}

template <int kCount>
__device__ __forceinline__ void store_row(float* to, const float (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    store(to + i, Pack<float>{{values[i], values[i + 1], values[i + 2], values[i + 3]}});
  }
}

// weight = gram^-1 1, normalized to sum 1, by Cholesky factorization. gram: lower triangle, row-major. Rows beyond
// `count` are those of the identity with right-hand side 0: their weights are 0.
__device__ __forceinline__ void solve(float (&gram)[kPairs], int count, float ridge, float (&weight)[kFew]) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kFew; ++i) sum += i < count ? gram[i * (i + 1) / 2 + i] : 0;
  const float mean = sum / static_cast<float>(count);
  const float scale = mean < 1e-12f ? 1e-12f : mean;  // NaN stays
#pragma unroll
  for (int i = 0; i < kFew; ++i) {
#pragma unroll
    for (int j = 0; j <= i; ++j) {
      float& value = gram[i * (i + 1) / 2 + j];
      value = i < count ? value / scale + (i == j ? ridge : 0) : (i == j ? 1 : 0);
    }
  }
#pragma unroll
  for (int i = 0; i < kFew; ++i) {
    float right = i < count ? 1 : 0;
#pragma unroll
    for (int j = 0; j <= i; ++j) {
      float value = gram[i * (i + 1) / 2 + j];
#pragma unroll
      for (int k = 0; k < j; ++k) value -= gram[i * (i + 1) / 2 + k] * gram[j * (j + 1) / 2 + k];
      gram[i * (i + 1) / 2 + j] = j < i ? value / gram[j * (j + 1) / 2 + j] : sqrtf(value);
      if (j < i) right -= gram[i * (i + 1) / 2 + j] * weight[j];
    }
    weight[i] = right / gram[i * (i + 1) / 2 + i];
  }
  sum = 0;
#pragma unroll
  for (int i = kFew - 1; i >= 0; --i) {
#pragma unroll
    for (int k = i + 1; k < kFew; ++k) weight[i] -= gram[k * (k + 1) / 2 + i] * weight[k];
    weight[i] /= gram[i * (i + 1) / 2 + i];
    sum += weight[i];
  }
#pragma unroll
  for (int i = 0; i < kFew; ++i) weight[i] /= sum;
}

template <class T>
__global__ void __launch_bounds__(kThreads) few_neighbors_kernel(const NeighborRegression p) {
  constexpr int kCount = Pack<T>::kCount;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpSize;
  if (row >= p.rows) return;  // uniform across the warp
  const T* bank = static_cast<const T*>(p.bank);
  const float* query = p.query + row * p.channels;
  int64_t start[kFew];
  bool known = true;
#pragma unroll
  for (int i = 0; i < kFew; ++i) {
    start[i] = i < p.neighbors ? start_of(p, row, i) : -1;
    known = known && (i >= p.neighbors || start[i] >= 0);
  }
  float gram[kPairs] = {};
  for (int channel = lane * kCount; channel < p.channels; channel += kWarpSize * kCount) {
    float center[kCount], difference[kFew][kCount] = {};
    load_center<T>(query + channel, center);
#pragma unroll
    for (int i = 0; i < kFew; ++i) {
      if (start[i] >= 0) load_difference<T>(bank + start[i] + channel, center, difference[i]);
    }
#pragma unroll
    for (int i = 0; i < kFew; ++i) {
#pragma unroll
      for (int j = 0; j <= i; ++j) {
#pragma unroll
        for (int c = 0; c < kCount; ++c) gram[i * (i + 1) / 2 + j] += difference[i][c] * difference[j][c];
      }
    }
  }
#pragma unroll
  for (int pair = 0; pair < kPairs; ++pair) gram[pair] = sum_lanes(gram[pair]);
  float weight[kFew] = {};
  solve(gram, p.neighbors, p.ridge, weight);
  // Weights sum to one, so the combination is the query plus the weighted differences.
  for (int channel = lane * kCount; channel < p.channels; channel += kWarpSize * kCount) {
    float center[kCount], difference[kCount], sum[kCount];
    load_center<T>(query + channel, center);
#pragma unroll
    for (int c = 0; c < kCount; ++c) sum[c] = known ? center[c] : nanf("");
#pragma unroll
    for (int i = 0; i < kFew; ++i) {
      if (start[i] < 0) continue;
      load_difference<T>(bank + start[i] + channel, center, difference);
#pragma unroll
      for (int c = 0; c < kCount; ++c) sum[c] += weight[i] * difference[c];
    }
    store_row(p.output + row * p.channels + channel, sum);
  }
}

// A linear system with one right-hand side.
struct System {
  float gram[kMaxNeighbors][kMaxNeighbors];
  float right[kMaxNeighbors], weight[kMaxNeighbors];
  float pivot_row[kMaxNeighbors + 1], factor[kMaxNeighbors];
  int64_t start[kMaxNeighbors];
};

template <class T>
__global__ void __launch_bounds__(kThreads, 4) many_neighbors_kernel(const NeighborRegression p) {
  constexpr int kCount = Pack<T>::kCount;
  BKD_SHARED(System, system);
  const int thread = threadIdx.x, lane = thread % kWarpSize, count = p.neighbors;
  const int64_t row = blockIdx.x;
  const T* bank = static_cast<const T*>(p.bank);
  const float* query = p.query + row * p.channels;
  for (int i = thread; i < count; i += kThreads) {
    system.start[i] = start_of(p, row, i);
    system.right[i] = 1;
  }
  __syncthreads();
  for (int pair = thread / kWarpSize; pair < count * count; pair += kWarps) {
    const int i = pair / count, j = pair % count;
    if (j > i) continue;
    const int64_t first = system.start[i], second = system.start[j];
    float sum = first < 0 || second < 0 ? nanf("") : 0;
    for (int channel = lane * kCount; channel < p.channels; channel += kWarpSize * kCount) {
      float center[kCount], one[kCount] = {}, other[kCount] = {};
      load_center<T>(query + channel, center);
      if (first >= 0) load_difference<T>(bank + first + channel, center, one);
      if (second >= 0) load_difference<T>(bank + second + channel, center, other);
#pragma unroll
      for (int c = 0; c < kCount; ++c) sum += one[c] * other[c];
    }
    sum = sum_lanes(sum);
    if (lane == 0) system.gram[i][j] = system.gram[j][i] = sum;
  }
  __syncthreads();
  float sum = 0;
  for (int i = 0; i < count; ++i) sum += system.gram[i][i];
  const float mean = sum / static_cast<float>(count), scale = mean < 1e-12f ? 1e-12f : mean;  // NaN stays
  __syncthreads();
  for (int i = thread; i < count * count; i += kThreads) {
    float& value = system.gram[i / count][i % count];
    value = value / scale + (i / count == i % count ? p.ridge : 0);
  }
  __syncthreads();
  // Gauss-Jordan; a positive definite matrix needs no pivoting.
  for (int step = 0; step < count; ++step) {
    for (int i = thread; i < count; i += kThreads) {
      system.pivot_row[i] = system.gram[step][i];
      system.factor[i] = i == step ? 0 : system.gram[i][step] / system.gram[step][step];
    }
    if (thread == 0) system.pivot_row[count] = system.right[step];
    __syncthreads();
    for (int i = thread; i < count * count; i += kThreads) {
      system.gram[i / count][i % count] -= system.factor[i / count] * system.pivot_row[i % count];
    }
    for (int i = thread; i < count; i += kThreads) system.right[i] -= system.factor[i] * system.pivot_row[count];
    __syncthreads();
  }
  for (int i = thread; i < count; i += kThreads) system.weight[i] = system.right[i] / system.gram[i][i];
  __syncthreads();
  sum = 0;
  for (int i = 0; i < count; ++i) sum += system.weight[i];
  for (int channel = thread * kCount; channel < p.channels; channel += kThreads * kCount) {
    float center[kCount], difference[kCount], total[kCount];
    load_center<T>(query + channel, center);
#pragma unroll
    for (int c = 0; c < kCount; ++c) total[c] = center[c];
    for (int i = 0; i < count; ++i) {
      const float weight = system.weight[i] / sum;
      if (system.start[i] >= 0) {
        load_difference<T>(bank + system.start[i] + channel, center, difference);
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
