// Rows as combinations of their neighbours. Of a few neighbours a warp has a row, and the whole system is in registers;
// of many a block has a row, and the system is in shared memory.
#include "neighbor_regression.h"

#include "device.cuh"

namespace bkd {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kFew = 6;  // neighbours of a warp's row, at most
constexpr int kPairs = kFew * (kFew + 1) / 2;

// The row of the bank where a neighbour starts, or -1.
__device__ __forceinline__ int64_t start_of(const NeighborRegression& p, int64_t row, int neighbor) {
  const int64_t index = load<int64_t>(p.neighbor + row * p.neighbors + neighbor);
  return index >= 0 && index < p.bank_rows ? index * p.channels : -1;
}

// Numbers of the query from a channel on.
template <class T>
__device__ __forceinline__ void load_own(const float* from, float (&own)[Pack<T>::kCount]) {
#pragma unroll
  for (int i = 0; i < Pack<T>::kCount; i += 4) {
    const Pack<float> four = load<Pack<float>>(from + i);
#pragma unroll
    for (int j = 0; j < 4; ++j) own[i + j] = four.value[j];
  }
}

// A neighbour less the query, from a channel on.
template <class T>
__device__ __forceinline__ void load_apart(const T* from, const float (&own)[Pack<T>::kCount],
                                           float (&apart)[Pack<T>::kCount]) {
  const Pack<T> pack = load<Pack<T>>(from);
#pragma unroll
  for (int i = 0; i < Pack<T>::kCount / 2; ++i) {
    const float2 two = pack.pair(i);
    apart[2 * i] = two.x - own[2 * i], apart[2 * i + 1] = two.y - own[2 * i + 1];
  }
}

template <int kCount>
__device__ __forceinline__ void store_row(float* to, const float (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    store(to + i, Pack<float>{{values[i], values[i + 1], values[i + 2], values[i + 3]}});
  }
}

// weight = gram^-1 1 by Cholesky's factors; gram's lower half, row after row. Rows beyond `count` are those of the unit
// matrix with 0 on the right: their weights are 0.
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
  if (row >= p.rows) return;  // a whole warp
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
    float own[kCount], apart[kFew][kCount] = {};
    load_own<T>(query + channel, own);
#pragma unroll
    for (int i = 0; i < kFew; ++i) {
      if (start[i] >= 0) load_apart<T>(bank + start[i] + channel, own, apart[i]);
    }
#pragma unroll
    for (int i = 0; i < kFew; ++i) {
#pragma unroll
      for (int j = 0; j <= i; ++j) {
#pragma unroll
        for (int c = 0; c < kCount; ++c) gram[i * (i + 1) / 2 + j] += apart[i][c] * apart[j][c];
      }
    }
  }
#pragma unroll
  for (int pair = 0; pair < kPairs; ++pair) gram[pair] = sum_lanes(gram[pair]);
  float weight[kFew] = {};
  solve(gram, p.neighbors, p.ridge, weight);
  // Weights sum to one: the combination is the row itself and the weighted differences.
  for (int channel = lane * kCount; channel < p.channels; channel += kWarpSize * kCount) {
    float own[kCount], apart[kCount], sum[kCount];
    load_own<T>(query + channel, own);
#pragma unroll
    for (int c = 0; c < kCount; ++c) sum[c] = known ? own[c] : nanf("");
#pragma unroll
    for (int i = 0; i < kFew; ++i) {
      if (start[i] < 0) continue;
      load_apart<T>(bank + start[i] + channel, own, apart);
#pragma unroll
      for (int c = 0; c < kCount; ++c) sum[c] += weight[i] * apart[c];
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
__global__ void __launch_bounds__(kThreads) many_neighbors_kernel(const NeighborRegression p) {
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
      float own[kCount], one[kCount] = {}, other[kCount] = {};
      load_own<T>(query + channel, own);
      if (first >= 0) load_apart<T>(bank + first + channel, own, one);
      if (second >= 0) load_apart<T>(bank + second + channel, own, other);
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
    float own[kCount], apart[kCount], total[kCount];
    load_own<T>(query + channel, own);
#pragma unroll
    for (int c = 0; c < kCount; ++c) total[c] = own[c];
    for (int i = 0; i < count; ++i) {
      const float weight = system.weight[i] / sum;
      if (system.start[i] >= 0) {
        load_apart<T>(bank + system.start[i] + channel, own, apart);
      } else {
#pragma unroll
        for (int c = 0; c < kCount; ++c) apart[c] = nanf("");
      }
#pragma unroll
      for (int c = 0; c < kCount; ++c) total[c] += weight * apart[c];
    }
    store_row(p.output + row * p.channels + channel, total);
  }
}

template <class T>
void start(const NeighborRegression& p, const Device& device) {
  // A few rows of many channels keep more multiprocessors busy a block each.
  if (p.neighbors > kFew || p.rows < device.processors) {
    launch("neighbor_regression", &many_neighbors_kernel<T>, p.rows, 1, 1, kThreads, 0, device, p);
  } else {
    launch("neighbor_regression", &few_neighbors_kernel<T>, blocks_for(p.rows, kWarps), 1, 1, kThreads, 0, device, p);
  }
}

}  // namespace

void neighbor_regression(const NeighborRegression& p, Type type, const Device& device) {
  by_type(type, [&](auto zero) { start<decltype(zero)>(p, device); });
}

}  // namespace bkd
