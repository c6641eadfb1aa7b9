// Modulated deformable convolution as an implicit GEMM: a block samples one tap of its pixels into shared memory and
// multiplies by the weights, without a column buffer. docs/kernels.md explains the notation.
#include "deform_conv.h"

#include <algorithm>

#include "sampling.cuh"
#include "tile.cuh"

namespace bkd {
namespace {

// Position in the depth (K) of the GEMM: kDepth channels of one tap, offset group and group.
struct Depth {
  int offset_group, tap, channel;
  int last;   // end of the channels that group and offset group share
  int table;  // which of the two neighbour tables
};
// The position after `step` steps in the group whose channels start at `begin`. Without a `step`, count the steps.
template <class T>
__device__ __forceinline__ int seek(const DeformConv& p, int begin, Depth& d, int step = 0x7fffffff) {
  const int end = begin + p.group_channels();
  int before = 0;
  for (d.offset_group = begin / p.offset_channels(), d.channel = begin; d.channel < end; ++d.offset_group) {
    d.last = min(end, (d.offset_group + 1) * p.offset_channels());
    const int steps = (d.last - d.channel + kDepth<T> - 1) / kDepth<T>;  // of a tap
    if (step - before < steps * p.sampling.taps) {
      d.tap = (step - before) / steps;
      d.channel += (step - before - d.tap * steps) * kDepth<T>;
      break;
    }
    before += steps * p.sampling.taps;
    d.channel = d.last;
  }
  return before;
}
// Advance within the group whose channels start at `begin`; return true if a new tap or offset group begins.
template <class T>
__device__ __forceinline__ bool next_depth(const DeformConv& p, int begin, Depth& d) {
  d.channel += kDepth<T>;
  if (d.channel < d.last) return false;
  d.table ^= 1;
  if (++d.tap < p.sampling.taps) {
    d.channel = max(begin, d.offset_group * p.offset_channels());
  } else {
    d.tap = 0;
    d.channel = d.last;
    d.last = min(begin + p.group_channels(), (++d.offset_group + 1) * p.offset_channels());
  }
  return true;
}

constexpr int kMinDepth = 128;  // numbers of depth in a part

template <class T, int kM, int kN>
struct Stages {
  unsigned char a[2][Tile<T, kM, true>::kBytes], b[2][Tile<T, kN, true>::kBytes];
  Neighbors<kM> neighbors[2];
};

template <class T, bool kTensor, int kM, int kN>
__global__ void __launch_bounds__(kThreads, kM == 128 ? (BKD_ARCH >= 800 && kTensor ? 2 : 1) : 3)
    deform_conv_kernel(const DeformConv p) {
  using A = Tile<T, kM, true>;
  using B = Tile<T, kN, true>;
  using Shared = Stages<T, kM, kN>;
  BKD_SHARED(Shared, shared);
  constexpr int kChunks = kDepthBytes / 16, kParts = kM * kChunks / kThreads;
  const T* weight = static_cast<const T*>(p.weight);
  const int tiles = (p.group_outputs() + kN - 1) / kN;
  const int group = blockIdx.y / tiles, first_output = blockIdx.y % tiles * kN;  // of the group
  const int first_pixel = blockIdx.x * kM, thread = threadIdx.x;

  const int begin = group * p.group_channels();  // of the group's channels
  constexpr bool kSplit = kM == 64;  // large tiles fill the device without
  Depth next{};
  const int64_t all_steps = seek<T>(p, begin, next);
  const int first_step = kSplit ? static_cast<int>(all_steps * blockIdx.z / p.parts) : 0;
  const int end_step = static_cast<int>(kSplit ? all_steps * (blockIdx.z + 1) / p.parts : all_steps);
  const int steps = end_step - first_step;
  next = {};
  seek<T>(p, begin, next, first_step);
  auto more = [&](const Depth& d) { return d.channel < begin + p.group_channels(); };
  auto compute = [&](const Depth& d) {
    const int own = first_pixel + thread;
    if (thread < kM)
      shared.neighbors[d.table].template compute<T>(thread, p.sampling, own, own < p.pixels, d.offset_group, d.tap);
  };
  // Compute the neighbours of the next tap or offset group, if `d` is the last step of its own.
  auto compute_next = [&](Depth d) {
    if (next_depth<T>(p, begin, d) && more(d)) compute(d);
  };
  auto copy_weights = [&](const Depth& d, int buffer) {
#pragma unroll
    for (int i = 0; i < kN * kChunks / kThreads; ++i) {
      const int row = (i * kThreads + thread) / kChunks, chunk = thread % kChunks;
      const int output = first_output + row, channel = d.channel + chunk * kVector<T>;
      const bool valid = output < p.group_outputs() && channel < d.last;
      const int64_t line = (int64_t{group} * p.group_outputs() + output) * p.sampling.taps + d.tap;
      copy_async(shared.b[buffer] + B::chunk(row, chunk),
                 weight + (valid ? line * p.group_channels() + channel - begin : 0), valid);
    }
    commit_copies();
  };
  // kThreads chunks of neighbour values in flight.
  CornerValues<T> corners;
  auto fetch = [&](const Depth& d, int part) {
    const T* input = static_cast<const T*>(p.input);
    const int row = (part * kThreads + thread) / kChunks, channel = d.channel + thread % kChunks * kVector<T>;
    if (channel < d.last)
      corners.fetch(input, load_shared<uint4>(&shared.neighbors[d.table].pixel[row]), p.channels, channel);
  };
  auto put = [&](const Depth& d, int part, int buffer) {
    const int row = (part * kThreads + thread) / kChunks, chunk = thread % kChunks;
    Pack<T> sampled{};
    if (d.channel + chunk * kVector<T> < d.last) {
      sampled = corners.template sums<kTensor>(load_shared<float4>(&shared.neighbors[d.table].weight[row]));
    }
    store_shared(shared.a[buffer] + A::chunk(row, chunk), sampled);
  };

  AccumulatorFragment<kM, kN> acc;
  acc.clear();
  // Software pipeline: multiply one step, sample `next`, and compute the neighbours of the one after.
  if (steps) {
    compute(next);
    compute_next(next);
    __syncthreads();
    copy_weights(next, 0);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      fetch(next, part);
      put(next, part, 0);
    }
  }
  for (int step = 0; step < steps; ++step) {
    const int buffer = step & 1;
    const bool sampling = step + 1 < steps;
    next_depth<T>(p, begin, next);
    wait_for_copies<0>();
    __syncthreads();
    if (sampling) {
      copy_weights(next, buffer ^ 1);
      compute_next(next);
    }
#pragma unroll 1  // to save registers
    for (int part = 0; part < kParts; ++part) {
      if (sampling) fetch(next, part);
#pragma unroll
      for (int mma = part * kSteps / kParts; mma < (part + 1) * kSteps / kParts; ++mma) {
        multiply_step<T, kTensor, A, B>(acc, shared.a[buffer], shared.b[buffer], mma);
      }
      if (sampling) put(next, part, buffer ^ 1);
    }
  }

  const T* bias = static_cast<const T*>(p.bias);
  T* output = static_cast<T*>(p.output);
  acc.pairs([&](int row, int column, float first, float second) {
    const int pixel = first_pixel + row, within = first_output + column;
    if (pixel >= p.pixels || within >= p.group_outputs()) return;
    const int channel = group * p.group_outputs() + within;
    const bool both = within + 1 < p.group_outputs();
    if (kSplit && p.parts > 1) {
      float* to = p.partial + (int64_t{blockIdx.z} * p.pixels + pixel) * p.outputs + channel;
      store(to, first);
      if (both) store(to + 1, second);
      return;
    }
    if (bias) first += wide(load<T>(bias + channel));
    if (bias && both) second += wide(load<T>(bias + channel + 1));
    T* to = output + int64_t{pixel} * p.outputs + channel;
    if (both && (p.outputs | channel) % 2 == 0) {
      store(to, Vec2<T>{narrow<T>(first), narrow<T>(second)});
    } else {
      store(to, narrow<T>(first));
      if (both) store(to + 1, narrow<T>(second));
    }
  });
}

// The output from its parts: their sum in order, and the bias. A thread has kEach numbers.
template <class T, int kEach>
__global__ void __launch_bounds__(kThreads) deform_conv_sum_kernel(const DeformConv p) {
  const int count = p.pixels * p.outputs, first = (blockIdx.x * kThreads + threadIdx.x) * kEach;
  if (first >= count) return;
  Vec<float, kEach> sum = load<Vec<float, kEach>>(p.partial + first);
#pragma unroll 4
  for (int part = 1; part < p.parts; ++part) {
    const auto own = load<Vec<float, kEach>>(p.partial + int64_t{part} * count + first);
#pragma unroll
    for (int i = 0; i < kEach; ++i) sum.value[i] += own.value[i];
  }
  const T* bias = static_cast<const T*>(p.bias);
  Vec<T, kEach> result;
  int channel = first % p.outputs;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    result.value[i] = narrow<T>(sum.value[i] + (bias ? wide(load<T>(bias + channel)) : 0));
    if (++channel == p.outputs) channel = 0;
  }
  store(static_cast<T*>(p.output) + first, result);
}

template <class T, int kEach>
void start_sum(const DeformConv& p, const Device& device) {
  launch("deform_conv_sum", &deform_conv_sum_kernel<T, kEach>,
         blocks_for(int64_t{p.pixels} * p.outputs, kThreads * kEach), 1, 1, kThreads, 0, device, p);
}

template <class T, bool kTensor, int kM, int kN>
void start(const DeformConv& p, const Device& device) {
  launch("deform_conv", &deform_conv_kernel<T, kTensor, kM, kN>, blocks_for(p.pixels, kM),
         p.groups * blocks_for(p.group_outputs(), kN), p.parts, kThreads, 0, device, p);
  if (p.parts == 1) return;
  const bool aligned = p.outputs % 4 == 0 && reinterpret_cast<uintptr_t>(p.output) % (4 * sizeof(T)) == 0;
  aligned ? start_sum<T, 4>(p, device) : start_sum<T, 1>(p, device);
}

int64_t tiles(const DeformConv& p, int rows, int columns) {
  return blocks_for(p.pixels, rows) * p.groups * blocks_for(p.group_outputs(), columns);
}
// Large tiles need the fewest reads, if there are two for each multiprocessor.
bool has_large_tiles(const DeformConv& p, const Device& device) {
  return p.group_outputs() > 64 && tiles(p, 128, 128) >= 2 * device.multiprocessors;
}

template <class T, bool kTensor>
void choose(const DeformConv& p, const Device& device) {
  has_large_tiles(p, device) ? start<T, kTensor, 128, 128>(p, device) : start<T, kTensor, 64, 64>(p, device);
}

}  // namespace

int deform_conv_parts(const DeformConv& p, const Device& device) {
  const int64_t blocks = std::max<int64_t>(1, tiles(p, 64, 64));
  if (has_large_tiles(p, device) || blocks >= 2 * device.multiprocessors) return 1;
  // A part has at least kMinDepth numbers of depth, so that its sums cost less than they save.
  const int64_t depth = int64_t{p.group_channels()} * p.sampling.taps;
  return static_cast<int>(std::max<int64_t>(1, std::min(blocks_for(2 * device.multiprocessors, blocks), depth / kMinDepth)));
}

void deform_conv(const DeformConv& p, Type type, bool tf32, const Device& device) {
  if (type == Type::kHalf) return choose<Half, true>(p, device);
  if (type == Type::kBFloat) return choose<BFloat, true>(p, device);
  if (tf32) return choose<float, true>(p, device);
  choose<float, false>(p, device);
}

}  // namespace bkd
