// Linear combinations of neighbours: differences of rows, and the systems that give the weights.
#pragma once

#include "device.cuh"
#include "neighbor_regression.h"

namespace bkd {
namespace {

constexpr int kFew = kFewNeighbors;  // max neighbours with one warp per row
constexpr int kPairs = kFew * (kFew + 1) / 2;

// Load channels of the query.
template <int kEach>
__device__ __forceinline__ void load_center(const float* from, float (&center)[kEach]) {
#pragma unroll
  for (int i = 0; i < kEach; i += 4) {
    const Pack<float> four = load<Pack<float>>(from + i);
#pragma unroll
    for (int j = 0; j < 4; ++j) center[i + j] = four.value[j];
  }
}

// Load the same channels of a neighbour, minus the query.
template <class T, int kEach>
__device__ __forceinline__ void load_difference(const T* from, const float (&center)[kEach],
                                                float (&difference)[kEach]) {
  if constexpr (kEach == Pack<T>::kCount) {
    const Pack<T> pack = load<Pack<T>>(from);
#pragma unroll
    for (int i = 0; i < kEach / 2; ++i) {
      const float2 two = pack.pair(i);
      difference[2 * i] = two.x - center[2 * i], difference[2 * i + 1] = two.y - center[2 * i + 1];
    }
  } else {
    const Vec<T, kEach> some = load<Vec<T, kEach>>(from);
#pragma unroll
    for (int i = 0; i < kEach; ++i) difference[i] = wide(some.value[i]) - center[i];
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

// A row as the combination of its neighbours, by one warp: output = sum of weight[i] * row i. start: where the rows
// begin in the bank; -1: not there, and the output is NaN. A lane has kEach channels at a time.
template <class T, int kEach>
__device__ __forceinline__ void combine(const float* query, const T* bank, const int64_t (&start)[kFew], int count,
                                        float ridge, int channels, int lane, float* output) {
  bool known = true;
#pragma unroll
  for (int i = 0; i < kFew; ++i) known = known && (i >= count || start[i] >= 0);
  float gram[kPairs] = {};
  for (int channel = lane * kEach; channel < channels; channel += kWarpSize * kEach) {
    float center[kEach], difference[kFew][kEach] = {};
    load_center(query + channel, center);
#pragma unroll
    for (int i = 0; i < kFew; ++i) {
      if (start[i] >= 0) load_difference(bank + start[i] + channel, center, difference[i]);
    }
#pragma unroll
    for (int i = 0; i < kFew; ++i) {
#pragma unroll
      for (int j = 0; j <= i; ++j) {
#pragma unroll
        for (int c = 0; c < kEach; ++c) gram[i * (i + 1) / 2 + j] += difference[i][c] * difference[j][c];
      }
    }
  }
#pragma unroll
  for (int pair = 0; pair < kPairs; ++pair) gram[pair] = sum_lanes(gram[pair]);
  float weight[kFew] = {};
  solve(gram, count, ridge, weight);
  // Weights sum to one, so the combination is the query plus the weighted differences.
  for (int channel = lane * kEach; channel < channels; channel += kWarpSize * kEach) {
    float center[kEach], difference[kEach], sum[kEach];
    load_center(query + channel, center);
#pragma unroll
    for (int c = 0; c < kEach; ++c) sum[c] = known ? center[c] : nanf("");
#pragma unroll
    for (int i = 0; i < kFew; ++i) {
      if (start[i] < 0) continue;
      load_difference(bank + start[i] + channel, center, difference);
#pragma unroll
      for (int c = 0; c < kEach; ++c) sum[c] += weight[i] * difference[c];
    }
    store_row(output + channel, sum);
  }
}

// A linear system with one right-hand side, in shared memory.
struct System {
  float gram[kMaxNeighbors][kMaxNeighbors];
  float right[kMaxNeighbors], weight[kMaxNeighbors];
  float pivot_row[kMaxNeighbors + 1], factor[kMaxNeighbors];
};

// weight = gram^-1 1 of a whole block, which calls it after a barrier; returns the sum of the weights. Gauss-Jordan; a
// positive definite matrix needs no pivoting.
template <int kThreads>
__device__ __forceinline__ float solve(System& system, int count, float ridge) {
  const int thread = threadIdx.x;
  for (int i = thread; i < count; i += kThreads) system.right[i] = 1;
  float sum = 0;
  for (int i = 0; i < count; ++i) sum += system.gram[i][i];
  const float mean = sum / static_cast<float>(count), scale = mean < 1e-12f ? 1e-12f : mean;  // NaN stays
  __syncthreads();
  for (int i = thread; i < count * count; i += kThreads) {
    float& value = system.gram[i / count][i % count];
    value = value / scale + (i / count == i % count ? ridge : 0);
  }
  __syncthreads();
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
  return sum;
}

}  // namespace
}  // namespace bkd
