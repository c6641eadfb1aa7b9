// Gradient of modulated deformable convolution with respect to its weights: per tap, outputs x channels, reduced over
// pixels. A block resamples its channels and multiplies grad by them; pixels are split over blocks (split K).
#include "deform_conv.h"

#include <algorithm>

#include "pipeline.cuh"
#include "sampling.cuh"

namespace bkd {
namespace {

constexpr int kN = 64;  // channels of a tile

template <class T, int kM>
struct Pixels {
  unsigned char a[2][Tile<T, kM, false>::kBytes], b[2][Tile<T, kN, false>::kBytes];
  Neighbors<kDepth<T>> neighbors[2];
};

// Channels of tile `tile`; a tile never crosses the border of a group or offset group.
struct ChannelRange {
  int begin, end;
};
__device__ __forceinline__ ChannelRange channel_range(const DeformConv& p, int tile) {
  for (int begin = 0;;) {
    const int group = (begin / p.group_channels + 1) * p.group_channels;
    const int offset_group = (begin / p.offset_channels + 1) * p.offset_channels;
    const int end = min(begin + kN, min(group, offset_group));
    if (tile-- == 0) return {begin, end};
    begin = end;
  }
}
int tiles_of(const DeformConv& p) {
  int tiles = 0;
  for (int begin = 0; begin < p.channels; ++tiles) {
    const int group = (begin / p.group_channels + 1) * p.group_channels;
    const int offset_group = (begin / p.offset_channels + 1) * p.offset_channels;
    begin = std::min(begin + kN, std::min(group, offset_group));
  }
  return tiles;
}

// Samples a chunk a thread of kDepth pixels; the neighbours of the step after are computed meanwhile.
template <class T, bool kTensor, class Shared>
struct PixelSamples {
  static constexpr int kTurns = 1, kRowChunks = kN / kVector<T>;
  const DeformConv& p;
  Shared& shared;
  ChannelRange range;
  int offset_group, tap, step, end;
  CornerValues<T> corners;
  bool more = true;

  __device__ __forceinline__ int row() const { return threadIdx.x / kRowChunks; }
  __device__ __forceinline__ int channel() const { return range.begin + threadIdx.x % kRowChunks * kVector<T>; }
  __device__ __forceinline__ bool valid() const { return channel() < range.end && step * kDepth<T> + row() < p.pixels; }
  __device__ __forceinline__ void compute(int at) {
    const int pixel = at * kDepth<T> + threadIdx.x;
    if (threadIdx.x < kDepth<T>) {
      shared.neighbors[at % 2].template compute<T>(threadIdx.x, p.sampling, pixel, pixel < p.pixels, offset_group, tap);
    }
  }
  __device__ __forceinline__ void next(bool one_more) { more = one_more, ++step; }
  __device__ __forceinline__ void fetch(int) {
    if (!more || !valid()) return;
    corners.fetch(static_cast<const T*>(p.input) + channel(),
                  load_shared<uint4>(&shared.neighbors[step % 2].pixel[row()]), p.input_line);
  }
  __device__ __forceinline__ void put(int, int buffer) {
    if (!more) return;
    Pack<T> values{};
    if (valid())
      values = corners.template sums<kTensor>(load_shared<float4>(&shared.neighbors[step % 2].weight[row()]));
    store_shared(shared.b[buffer] + Tile<T, kN, false>::chunk(row(), threadIdx.x % kRowChunks), values);
    if (step + 1 < end) compute(step + 1);  // overwrites those of the step before
  }
};

template <class T, bool kTensor, int kM>
__global__ void __launch_bounds__(kThreads, 2) deform_conv_weight_kernel(const DeformConv p) {
  using A = Tile<T, kM, false>;
  using B = Tile<T, kN, false>;
  using Shared = Pixels<T, kM>;
  BKD_SHARED(Shared, shared);
  constexpr int kRowChunksA = kM / kVector<T>;
  static_assert(kDepth<T> * kN / kVector<T> == kThreads, "each thread samples one chunk");
  const T* grad = static_cast<const T*>(p.grad);
  const Sampling& s = p.sampling;
  const int part = blockIdx.x, tap = blockIdx.y % s.taps, thread = threadIdx.x;
  const ChannelRange range = channel_range(p, blockIdx.y / s.taps);
  const int group = range.begin / p.group_channels, offset_group = range.begin / p.offset_channels;
  const int first_output = blockIdx.z * kM;  // of the group
  const int steps = (p.pixels + kDepth<T> - 1) / kDepth<T>;
  const int begin = static_cast<int>(int64_t{steps} * part / p.parts);
  const int end = static_cast<int>(int64_t{steps} * (part + 1) / p.parts);

  int copied = begin;
  const auto copy_grad = [&](int stage, bool) {
#pragma unroll
    for (int i = 0; i < kDepth<T> * kRowChunksA / kThreads; ++i) {
      const int row = (i * kThreads + thread) / kRowChunksA, chunk = thread % kRowChunksA;
      const int pixel = copied * kDepth<T> + row, output = first_output + chunk * kVector<T>;
      const bool valid = pixel < p.pixels && output < p.group_outputs;
      const T* from = grad + (valid ? int64_t{pixel} * p.outputs + group * p.group_outputs + output : 0);
      copy_async(shared.a[stage] + A::chunk(row, chunk), from, valid);
    }
    ++copied;
  };
  AccumulatorFragment<kM, kN> acc;
  acc.clear();
  const LaneOffsets<A, B, decltype(acc)> lane;
  if (begin < end) {
    PixelSamples<T, kTensor, Shared> samples{p, shared, range, offset_group, tap, begin, end};
    samples.compute(begin);
    __syncthreads();
    run_pipeline<2>(end - begin, copy_grad, samples, [&](int, int stage, int buffer) {
      multiply_tiles<T, kTensor, A, B>(acc, lane, shared.a[stage], shared.b[buffer]);
    });
  }
  acc.pairs([&](int output, int column, float first, float second) {
    const int within = first_output + output, own = range.begin + column;
    if (within >= p.group_outputs || own >= range.end) return;
    const int64_t line = ((int64_t{part} * p.outputs + group * p.group_outputs + within) * s.taps + tap);
    store(p.grad_weight + line * p.group_channels + own - group * p.group_channels, make_float2(first, second));
  });
}

template <class T, bool kTensor>
void choose(const DeformConv& p, const Device& device) {
  const int tiles = tiles_of(p) * p.sampling.taps;
  if (p.group_outputs > 64) {
    launch("deform_conv_weight", &deform_conv_weight_kernel<T, kTensor, 128>, p.parts, tiles,
           blocks_for(p.group_outputs, 128), kThreads, 0, device, p);
  } else {
    launch("deform_conv_weight", &deform_conv_weight_kernel<T, kTensor, 64>, p.parts, tiles,
           blocks_for(p.group_outputs, 64), kThreads, 0, device, p);
  }
}

}  // namespace

void deform_conv_weight(const DeformConv& p, Type type, bool tf32, const Device& device) {
  if (type == Type::kHalf) return choose<Half, true>(p, device);
  if (type == Type::kBFloat) return choose<BFloat, true>(p, device);
  if (tf32) return choose<float, true>(p, device);
  choose<float, false>(p, device);
}

}  // namespace bkd
