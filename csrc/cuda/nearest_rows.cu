// The nearest rows of a bank. A warp has a query and goes over its scores once, 32 at a time; its lanes hold the
// largest so far in falling order. After the first scores few others are larger, so that most steps are a load and a
// vote.
#include "nearest_rows.h"

#include "device.cuh"

namespace bkd {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kAhead = 4;  // loads of a lane at a time

// Number `entry * 32 + lane` of a warp's largest scores. Of equal scores the first row is in front; NaN is never in.
template <int kEntries>
struct Largest {
  float score[kEntries];
  int row[kEntries];

  __device__ __forceinline__ void reset(int lane) {
#pragma unroll
    for (int e = 0; e < kEntries; ++e) score[e] = -INFINITY, row[e] = e * kWarpSize + lane;
  }
  // The smallest of the first `count`; all lanes get it.
  __device__ __forceinline__ float last(int count) const {
    const int at = count - 1;
    const float own = kEntries > 1 && at >= kWarpSize ? score[kEntries - 1] : score[0];
    return __shfl_sync(kAll, own, at % kWarpSize);
  }
  // All lanes call it with the same score, which is not NaN.
  __device__ __forceinline__ void insert(float value, int other, int lane) {
    int position = 0;
#pragma unroll
    for (int e = 0; e < kEntries; ++e) position += __popc(__ballot_sync(kAll, score[e] >= value));
    float before[kEntries];
    int before_row[kEntries];
#pragma unroll
    for (int e = 0; e < kEntries; ++e) {  // of the lane in front; lane 0: of the last one
      before[e] = __shfl_sync(kAll, score[e], (lane + kWarpSize - 1) % kWarpSize);
      before_row[e] = __shfl_sync(kAll, row[e], (lane + kWarpSize - 1) % kWarpSize);
    }
#pragma unroll
    for (int e = kEntries - 1; e >= 0; --e) {
      const int number = e * kWarpSize + lane;
      const bool carried = e > 0 && lane == 0;
      if (number > position) {
        score[e] = carried ? before[e > 0 ? e - 1 : 0] : before[e];
        row[e] = carried ? before_row[e > 0 ? e - 1 : 0] : before_row[e];
      } else if (number == position) {
        score[e] = value, row[e] = other;
      }
    }
  }
};

template <int kEntries>
__global__ void __launch_bounds__(kThreads) nearest_rows_kernel(const NearestRows p) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t query = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpSize;
  if (query >= p.queries) return;  // the whole warp
  const float* products = p.products + query * p.rows;
  Largest<kEntries> largest;
  largest.reset(lane);
  float bound = -INFINITY;
  for (int64_t first = 0; first < p.rows; first += kAhead * kWarpSize) {
    float score[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t row = first + i * kWarpSize + lane;
      score[i] = row < p.rows ? load<float>(products + row) - load<float>(p.half_squares + row) : -INFINITY;
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      uint32_t larger = __ballot_sync(kAll, score[i] > bound);
      while (larger) {  // row after row, the first in front
        const int source = __ffs(static_cast<int>(larger)) - 1;
        larger &= larger - 1;
        const float value = __shfl_sync(kAll, score[i], source);
        if (!(value > bound)) continue;
        largest.insert(value, static_cast<int>(first + i * kWarpSize + source), lane);
        bound = largest.last(p.count);
      }
    }
  }
#pragma unroll
  for (int e = 0; e < kEntries; ++e) {
    const int number = e * kWarpSize + lane;
    if (number < p.count) store(p.index + query * p.count + number, static_cast<int64_t>(largest.row[e]));
  }
}

}  // namespace

void nearest_rows(const NearestRows& p, const Device& device) {
  auto with = [&](auto kernel) {
    launch("nearest_rows", kernel, blocks_for(p.queries, kWarps), 1, 1, kThreads, 0, device, p);
  };
  if (p.count <= kWarpSize) {
    with(&nearest_rows_kernel<1>);
  } else {
    with(&nearest_rows_kernel<2>);
  }
}

}  // namespace bkd
