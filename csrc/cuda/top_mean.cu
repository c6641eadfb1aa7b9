// The mean of the largest values of rows. A block has a row: it finds the smallest value that counts by a radix select,
// and adds up those above it in an order that is always the same.
#include "top_mean.h"

#include "device.cuh"

namespace bkd {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kDigits = 2048;  // 11 bits, the first two times of three; then 10
constexpr int kEach = kDigits / kThreads;
static_assert(kWarps == kWarpSize, "a warp adds up what all warps have");

struct Shared {
  int histogram[kDigits];
  int warp[kWarps];
  float sum[kWarps];
  int digit, rank;
};

// Bits that are ordered as the numbers are, and back.
__device__ __forceinline__ uint32_t ordered(float value) {
  const uint32_t bits = static_cast<uint32_t>(__float_as_int(value));
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float number(uint32_t bits) {
  return __int_as_float(static_cast<int>(bits & 0x80000000u ? bits ^ 0x80000000u : ~bits));
}

// Of the digits that the histogram counts, find that of the `rank`-th largest, and its rank among its equals. All
// threads call it.
__device__ __forceinline__ void find_digit(Shared& shared, int rank) {
  const int thread = threadIdx.x, lane = thread % kWarpSize, warp = thread / kWarpSize;
  int own[kEach], total = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) total += own[i] = shared.histogram[thread * kEach + i];
  int above = total;  // counts of this thread and those of its warp that come after it
#pragma unroll
  for (int step = 1; step < kWarpSize; step *= 2) {
    const int other = __shfl_down_sync(kAll, above, step);
    above += lane + step < kWarpSize ? other : 0;
  }
  if (lane == 0) shared.warp[warp] = above;
  above -= total;
  __syncthreads();
  for (int i = warp + 1; i < kWarps; ++i) above += shared.warp[i];
#pragma unroll
  for (int i = kEach - 1; i >= 0; --i) {
    if (above < rank && rank <= above + own[i]) {  // in one thread, for one digit
      shared.digit = thread * kEach + i;
      shared.rank = rank - above;
    }
    above += own[i];
  }
  __syncthreads();
}

__global__ void __launch_bounds__(kThreads) top_mean_kernel(const TopMean p) {
  BKD_SHARED(Shared, shared);
  const int thread = threadIdx.x, lane = thread % kWarpSize, warp = thread / kWarpSize;
  const float* values = p.values + int64_t{blockIdx.x} * p.width;
  uint32_t found = 0, known = 0;
  int rank = p.count;
  bool nan = false;
  for (int shift = 21; shift >= 0; shift = shift == 21 ? 10 : shift - 10) {
    for (int i = thread; i < kDigits; i += kThreads) shared.histogram[i] = 0;
    __syncthreads();
    const uint32_t mask = shift == 0 ? kDigits / 2 - 1 : kDigits - 1;
    for (unsigned i = thread; i < p.width; i += kThreads) {
      const float value = load<float>(values + i);
      const uint32_t bits = ordered(value);
      nan = nan || value != value;
      if ((bits & known) == found) atomicAdd(&shared.histogram[bits >> shift & mask], 1);
    }
    if (__syncthreads_or(nan)) {
      if (thread == 0) store(p.mean + blockIdx.x, nanf(""));
      return;  // the whole block
    }
    find_digit(shared, rank);
    found |= static_cast<uint32_t>(shared.digit) << shift, known |= mask << shift;
    rank = shared.rank;
  }
  float sum = 0;
  for (unsigned i = thread; i < p.width; i += kThreads) {
    const float value = load<float>(values + i);
    sum += ordered(value) > found ? value : 0;
  }
  sum = sum_lanes(sum);
  if (lane == 0) shared.sum[warp] = sum;
  __syncthreads();
  if (warp > 0) return;
  sum = sum_lanes(shared.sum[lane]);
  // All that remain are equal to the smallest.
  if (lane == 0)
    store(p.mean + blockIdx.x, (sum + static_cast<float>(rank) * number(found)) / static_cast<float>(p.count));
}

}  // namespace

void top_mean(const TopMean& p, const Device& device) {
  launch("top_mean", &top_mean_kernel, p.rows, 1, 1, kThreads, 0, device, p);
}

}  // namespace bkd
