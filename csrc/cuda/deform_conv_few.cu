// Modulated deformable convolution of groups of few channels, which would leave most of a tensor core's tile empty, and
// its gradients. Products are float32 multiply-adds. Nothing is saved by the forward pass.
#include "deform_conv_few.h"

#include <algorithm>

#include "scatter.cuh"

namespace bkd {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarpSize;
using Table = Neighbors<kThreads>;

// Which chunk of which row a thread has, where a block has so many chunks of the pixels of its rows; and the block's
// neighbours, for each offset group of these chunks. A table has room for those of `slots` taps, or of `slots` times so
// many pixels.
struct Place {
  int pixels, row, first_chunk, chunk;
  int first_group, group, groups, slots;
  int first_entry, entries;  // of the table: the thread's own of the first slot, and those of a slot

  // chunks: of a pixel and block; a power of 2.
  __device__ __forceinline__ Place(const DeformConvFew& p, int chunks, int block) {
    pixels = kThreads / chunks, row = threadIdx.x / chunks;
    first_chunk = block * chunks, chunk = first_chunk + threadIdx.x % chunks;
    first_group = first_chunk / p.offset_chunks, group = chunk / p.offset_chunks;
    groups = min(first_chunk + chunks - 1, p.chunks - 1) / p.offset_chunks - first_group + 1;
    slots = kThreads / pixels / groups;
    first_entry = (group - first_group) * pixels + row, entries = groups * pixels;
  }
  // Compute `count` slots: of pixels from `pixel` on and `tap`, each further on by so many.
  template <class T>
  __device__ __forceinline__ void compute(Table& table, const DeformConvFew& p, int count, int pixel, int more_pixels,
                                          int tap, int more_taps) const {
    const int thread = threadIdx.x, index = thread % pixels, each = thread / pixels, slot = each / groups;
    if (slot >= count) return;
    const int own = pixel + slot * more_pixels + index;
    table.template compute<T>(thread, p.sampling, own, own < p.pixels, first_group + each % groups,
                              tap + slot * more_taps);
  }
  // Sample the thread's channels.
  template <class T>
  __device__ __forceinline__ void sample(float (&value)[kFewChannels], const Table& table, int slot, const T* input,
                                         uint32_t line) const {
    const int at = first_entry + slot * entries;
    const uint4 pixel = load_shared<uint4>(&table.pixel[at]);
    const float4 weight = load_shared<float4>(&table.weight[at]);
    constexpr int kEach = Pack<T>::kCount;
#pragma unroll
    for (int first = 0; first < kFewChannels; first += kEach) {
      CornerValues<T> corners;
      corners.fetch(input + first, pixel, line);
#pragma unroll
      for (int i = 0; i < kEach / 2; ++i) {
        const float2 two = corners.sum(i, weight);
        value[first + 2 * i] = two.x, value[first + 2 * i + 1] = two.y;
      }
    }
  }
};

// Load a chunk of numbers.
template <class T>
__device__ __forceinline__ void load_chunk(float (&value)[kFewChannels], const T* from) {
  constexpr int kEach = Pack<T>::kCount;
#pragma unroll
  for (int first = 0; first < kFewChannels; first += kEach) {
    const auto pack = load<Pack<T>>(from + first);
#pragma unroll
    for (int i = 0; i < kEach / 2; ++i) {
      const float2 two = pack.pair(i);
      value[first + 2 * i] = two.x, value[first + 2 * i + 1] = two.y;
    }
  }
}

// A thread has a chunk of a pixel, and of each of its groups kWidth outputs.
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 2 : 1)
    deform_conv_few_kernel(const DeformConvFew p, int chunks) {
  BKD_SHARED(Table, table);
  const int taps = p.sampling.taps, first_pixel = blockIdx.x * (kThreads / chunks);
  const Place own(p, chunks, blockIdx.y);
  const bool active = first_pixel + own.row < p.pixels && own.chunk < p.chunks;
  const T* input = static_cast<const T*>(p.input) + int64_t{own.chunk} * kFewChannels;
  const T* weight = static_cast<const T*>(p.weight) + int64_t{blockIdx.z} * taps * kWidth * p.channels +
                    int64_t{own.chunk} * kFewChannels;  // of the next tap and output

  float sums[kFewChannels] = {};
  for (int first = 0; first < taps; first += own.slots) {
    const int count = min(own.slots, taps - first);
    if (first) __syncthreads();
    own.template compute<T>(table, p, count, first_pixel, 0, first, 1);
    __syncthreads();
#pragma unroll 1  // to save registers
    for (int slot = 0; slot < (active ? count : 0); ++slot) {
      float value[kFewChannels];
      own.sample(value, table, slot, input, p.input_line);
#pragma unroll
      for (int i = 0; i < kWidth; ++i, weight += p.channels) {
        float factor[kFewChannels];
        keep(weight);  // else it is worked out for all outputs beforehand
        load_chunk(factor, weight);
#pragma unroll
        for (int k = 0; k < kFewChannels; ++k) sums[k / kWidth * kWidth + i] += value[k] * factor[k];
      }
    }
  }
  if (!active) return;
  keep(chunks);  // so that nothing of the place stays in registers during the loop for what follows
  const Place at(p, chunks, blockIdx.y);
  const T* bias = static_cast<const T*>(p.bias);
  T* output = static_cast<T*>(p.output) + int64_t{first_pixel + at.row} * p.outputs;
  if (p.whole) {
    constexpr int kEach = Pack<T>::kCount;
    const int channel = at.chunk * kFewChannels;
#pragma unroll
    for (int first = 0; first < kFewChannels; first += kEach) {
      Pack<T> result;
      const auto added = bias ? load<Pack<T>>(bias + channel + first) : Pack<T>{};
#pragma unroll
      for (int i = 0; i < kEach / 2; ++i) {
        const float2 two = added.pair(i);
        result.set_pair(i, make_float2(sums[first + 2 * i] + two.x, sums[first + 2 * i + 1] + two.y));
      }
      store(output + channel + first, result);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kFewChannels; ++i) {
    // In the offset group, and in the group.
    const int number = (at.chunk - at.group * p.offset_chunks) * (kFewChannels / kWidth) + i / kWidth;
    const int within = blockIdx.z * kWidth + i % kWidth;
    if (number >= p.own_groups || within >= p.group_outputs) continue;
    const int channel = (at.group * p.own_groups + number) * p.group_outputs + within;
    store(output + channel, narrow<T>(sums[i] + (bias ? wide(load<T>(bias + channel)) : 0)));
  }
}

// For each of a lane's channels, output `i` of its group, which a lane of this half warp has.
template <bool kExact, int kWidth>
__device__ __forceinline__ void of_groups(float (&output)[kLaneChannels], const float (&value)[kLaneChannels], int i) {
  const int lane = threadIdx.x % kWarpSize;
  if constexpr (kWidth > kLaneChannels && LaneChannels<kExact>::kAdjacent) {
    constexpr int kLanes = kWidth / kLaneChannels;
    const float both = __shfl_sync(kAll, value[i % kLaneChannels], lane / kLanes * kLanes + i / kLaneChannels);
#pragma unroll
    for (int k = 0; k < kLaneChannels; ++k) output[k] = both;
  } else {
#pragma unroll
    for (int k = 0; k < kLaneChannels; ++k) {
      if constexpr (kWidth == 1) {
        output[k] = value[k];
      } else if constexpr (LaneChannels<kExact>::kAdjacent) {
        output[k] = value[k / kWidth * kWidth + i];
      } else {
        output[k] = __shfl_sync(kAll, value[k], lane / kWidth * kWidth + i);
      }
    }
  }
}

// A warp has a tap of an offset group of a pixel; warps of the same pixel are neighbours, since they read the same
// gradient and nearly the same pixels of the input.
template <class T, bool kExact, int kWidth>
__global__ void __launch_bounds__(kThreads, BKD_ARCH >= 1000 ? 2 : 3)
    deform_conv_few_backward_kernel(const DeformConvFew p) {
  using Lane = LaneChannels<kExact>;
  const Sampling& s = p.sampling;
  const int slots = s.taps * p.offset_groups, item = blockIdx.x % slots * kWarps + threadIdx.x / kWarpSize;
  const int64_t pixel = int64_t{blockIdx.x / slots} * kWarps + item / slots;
  if (pixel >= p.pixels) return;  // uniform across the warp
  const int slot = item % slots, group = slot / s.taps, tap = slot - group * s.taps;
  const OutputPixel out = output_pixel(s, static_cast<int>(pixel));
  const Sample sample = sample_at<T>(s, out, group, tap, false);
  const T* grad = static_cast<const T*>(p.grad) + pixel * p.rounds * p.channels;
  const T* weight = static_cast<const T*>(p.weight) + int64_t{tap} * kWidth * p.channels;
  const float scale = kExact ? load<float>(p.grad_input.scale) : 1;
  float dots[2] = {};
  const int end = (group + 1) * p.offset_chunks * kFewChannels;
  for (int channel = group * p.offset_chunks * kFewChannels; channel < end; channel += kTileChannels) {
    const int count = end - channel;
    float column[kLaneChannels] = {};  // gradients of the sample

#pragma unroll 1  // to save registers
    for (int round = 0; round < p.rounds; ++round) {
      float outputs[kLaneChannels];
      Lane::load_tile(outputs, grad + int64_t{round} * p.channels + channel, count);
      const T* from = weight + int64_t{round} * s.taps * kWidth * p.channels + channel;
#pragma unroll
      for (int i = 0; i < kWidth; ++i, from += p.channels) {
        float own[kLaneChannels], factor[kLaneChannels];
        of_groups<kExact, kWidth>(own, outputs, i);
        keep(from);
        Lane::load_tile(factor, from, count);
#pragma unroll
        for (int k = 0; k < kLaneChannels; ++k) column[k] += own[k] * factor[k];
      }
    }
    // An infinite gradient times the zeros that fill up a group would not be a number.
#pragma unroll
    for (int k = 0; k < kLaneChannels; ++k)
      if (Lane::at(k) % kWidth >= p.group_channels) column[k] = 0;
    scatter<kExact>(column, sample, static_cast<const T*>(p.input), p.channels, channel, count, p.grad_input, scale,
                    p.grad_sampling.needed(), dots);
  }
  if (p.grad_sampling.needed())
    store_sampling_gradients(s, p.grad_sampling, p.offset_groups, out, group, tap, sample, dots);
}

struct PixelSums {
  Table table;
  alignas(16) float sums[kWarps][kWarpSize * kFewChannels];
};

// A block has a tap, some chunks and a part of the pixels; a thread a chunk, and kWidth outputs of each of its groups.
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads, kWidth == 8 ? 1 : 2)
    deform_conv_few_weight_kernel(const DeformConvFew p, int chunks) {
  BKD_SHARED(PixelSums, shared);
  const int taps = p.sampling.taps, tap = blockIdx.y % taps, part = blockIdx.x, round = blockIdx.z;
  const Place own(p, chunks, blockIdx.y / taps);
  const int64_t grad_line = int64_t{p.rounds} * p.channels;
  const T* input = static_cast<const T*>(p.input) + int64_t{own.chunk} * kFewChannels;
  const T* grad = static_cast<const T*>(p.grad) + int64_t{round} * p.channels + int64_t{own.chunk} * kFewChannels;
  const int steps = (p.pixels + own.pixels - 1) / own.pixels;
  const int begin = static_cast<int>(int64_t{steps} * part / p.parts);
  const int end = static_cast<int>(int64_t{steps} * (part + 1) / p.parts);

  float sums[kWidth][kFewChannels] = {};
  for (int first = begin; first < end; first += own.slots) {
    const int count = min(own.slots, end - first);
    if (first > begin) __syncthreads();
    own.template compute<T>(shared.table, p, count, first * own.pixels, own.pixels, tap, 0);
    __syncthreads();
#pragma unroll 1  // to save registers
    for (int slot = 0; slot < (own.chunk < p.chunks ? count : 0); ++slot) {
      const int pixel = (first + slot) * own.pixels + own.row;
      if (pixel >= p.pixels) break;
      float value[kFewChannels], outputs[kFewChannels];
      own.sample(value, shared.table, slot, input, p.input_line);
      load_chunk(outputs, grad + pixel * grad_line);
#pragma unroll
      for (int i = 0; i < kWidth; ++i)
#pragma unroll
        for (int k = 0; k < kFewChannels; ++k) sums[i][k] += outputs[k / kWidth * kWidth + i] * value[k];
    }
  }
  // Rows are added up: those of a warp in its lanes, then warps in order.
  const int thread = threadIdx.x, lane = thread % kWarpSize, channel = own.first_chunk * kFewChannels + thread;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    for (int step = chunks; step < kWarpSize; step *= 2) {
#pragma unroll
      for (int k = 0; k < kFewChannels; ++k) sums[i][k] += __shfl_xor_sync(kAll, sums[i][k], step);
    }
    if (i) __syncthreads();
    if (lane < chunks) {
      float* to = shared.sums[thread / kWarpSize] + lane * kFewChannels;
      store_shared(to, make_float4(sums[i][0], sums[i][1], sums[i][2], sums[i][3]));
      store_shared(to + 4, make_float4(sums[i][4], sums[i][5], sums[i][6], sums[i][7]));
    }
    __syncthreads();
    if (thread >= chunks * kFewChannels || channel >= p.channels) continue;
    float total = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) total += load_shared<float>(&shared.sums[warp][thread]);
    const int64_t line = ((int64_t{part} * p.rounds + round) * taps + tap) * kWidth + i;
    store(p.grad_weight + line * p.channels + channel, total);
  }
}

// Chunks of a pixel and block.
int chunks_for(const DeformConvFew& p) {
  int chunks = 1;
  while (chunks < p.chunks && chunks < kWarpSize) chunks *= 2;
  return chunks;
}

// Call call(T{}, width), where the width is a constant.
template <class Call>
void choose(const DeformConvFew& p, Type type, const Call& call) {
  dispatch(type, [&](auto zero) {
    if (p.width == 1) return call(zero, std::integral_constant<int, 1>{});
    if (p.width == 2) return call(zero, std::integral_constant<int, 2>{});
    if (p.width == 4) return call(zero, std::integral_constant<int, 4>{});
    call(zero, std::integral_constant<int, 8>{});
  });
}

}  // namespace

void deform_conv_few(const DeformConvFew& p, Type type, const Device& device) {
  const int chunks = chunks_for(p);
  choose(p, type, [&](auto zero, auto width) {
    launch("deform_conv_few", &deform_conv_few_kernel<decltype(zero), decltype(width)::value>,
           blocks_for(p.pixels, kThreads / chunks), blocks_for(p.chunks, chunks), p.rounds, kThreads, 0, device, p,
           chunks);
  });
}

void deform_conv_few_backward(const DeformConvFew& p, Type type, const Device& device) {
  choose(p, type, [&](auto zero, auto width) {
    using T = decltype(zero);
    constexpr int kWidth = decltype(width)::value;
    const auto kernel = p.grad_input.fixed ? &deform_conv_few_backward_kernel<T, true, kWidth>
                                           : &deform_conv_few_backward_kernel<T, false, kWidth>;
    launch("deform_conv_few_backward", kernel, blocks_for(p.pixels, kWarps) * p.sampling.taps * p.offset_groups, 1, 1,
           kThreads, 0, device, p);
  });
}

void deform_conv_few_weight(const DeformConvFew& p, Type type, const Device& device) {
  const int chunks = chunks_for(p);
  choose(p, type, [&](auto zero, auto width) {
    launch("deform_conv_few_weight", &deform_conv_few_weight_kernel<decltype(zero), decltype(width)::value>, p.parts,
           blocks_for(p.chunks, chunks) * p.sampling.taps, p.rounds, kThreads, 0, device, p, chunks);
  });
}

}  // namespace bkd
