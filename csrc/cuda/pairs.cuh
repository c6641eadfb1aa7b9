// Channel reductions per pixel of a teacher and its students.
#pragma once

#include "device.cuh"
#include "pairs.h"

namespace bkd {
namespace {

constexpr int kPixels = 32, kThreadsPerPixel = 8;  // kPixels: of a block
constexpr float kEpsilon = 1e-8f;                  // min product of norms in a cosine

__device__ __forceinline__ float cosine(float dot, float teacher, float student) {
  return dot / fmaxf(sqrtf(teacher * student), kEpsilon);
}

// Accumulators over the channels of one pixel and kBranches students.
template <int kBranches>
struct ChannelSums {
  float teacher = 0, dot[kBranches] = {}, student[kBranches] = {}, square[kBranches] = {};

  __device__ __forceinline__ void add(int branch, float t, float s) {
    dot[branch] += t * s;
    student[branch] += s * s;
    square[branch] += (t - s) * (t - s);
  }
  // Apply the reduction `combine` to every accumulator.
  template <class Combine>
  __device__ __forceinline__ void each(Combine combine) {
    teacher = combine(teacher);
#pragma unroll
    for (int b = 0; b < kBranches; ++b) {
      dot[b] = combine(dot[b]);
      student[b] = combine(student[b]);
      square[b] = combine(square[b]);
    }
  }
};

// Reduce the channels of the block's pixels and call visit(vector, sums) in one thread per pixel. All threads of the
// block must call it. The teacher is read once for all students.
template <class T, bool kFirst, int kBranches, class Visit>
__device__ __forceinline__ void sum_channels(const Pair& p, Visit visit) {
  using Partial = float[kThreadsPerPixel][kPixels];
  const int thread = threadIdx.x;
  const int own = kFirst ? thread % kPixels : thread / kThreadsPerPixel,
            slice = kFirst ? thread / kPixels : thread % kThreadsPerPixel;
  const int64_t vector = int64_t{blockIdx.x} * kPixels + own;
  const bool valid = vector < p.vectors();
  ChannelSums<kBranches> sums;
  const T* teacher = static_cast<const T*>(p.teacher);
  if (valid && kFirst) {
    const int64_t image = vector / p.pixels, first = image * p.channels * p.pixels + vector % p.pixels;
    for (int channel = slice; channel < p.channels; channel += kThreadsPerPixel) {
      const int64_t at = first + int64_t{channel} * p.pixels;
      const float t = wide(load<T>(teacher + at));
      sums.teacher += t * t;
#pragma unroll
      for (int b = 0; b < kBranches; ++b) {
        if (b < p.branches) sums.add(b, t, wide(load<T>(static_cast<const T*>(p.student[b]) + at)));
      }
    }
  } else if (valid) {
    for (int channel = slice * Pack<T>::kCount; channel < p.channels; channel += kThreadsPerPixel * Pack<T>::kCount) {
      const int64_t at = vector * p.channels + channel;
      const Pack<T> t = load<Pack<T>>(teacher + at);
      Pack<T> s[kBranches];
#pragma unroll
      for (int b = 0; b < kBranches; ++b) {
        if (b < p.branches) s[b] = load<Pack<T>>(static_cast<const T*>(p.student[b]) + at);
      }
#pragma unroll
      for (int i = 0; i < Pack<T>::kCount / 2; ++i) {
        const float2 x = t.pair(i);
        sums.teacher += x.x * x.x + x.y * x.y;
#pragma unroll
        for (int b = 0; b < kBranches; ++b) {
          if (b >= p.branches) continue;
          const float2 y = s[b].pair(i);
          sums.add(b, x.x, y.x);
          sums.add(b, x.y, y.y);
        }
      }
    }
  }
  if constexpr (kFirst) {
    BKD_SHARED(Partial, partial);
    sums.each([&](float x) {
      __syncthreads();
      store_shared(&partial[slice][own], x);
      __syncthreads();
      float total = 0;
      for (int i = 0; i < kThreadsPerPixel; ++i) total += load_shared<float>(&partial[i][own]);
      return total;
    });
  } else {
    sums.each([](float x) { return sum_lanes<kThreadsPerPixel>(x); });
  }
  if (valid && slice == 0) visit(vector, sums);
}

}  // namespace
}  // namespace bkd
