// Modulated deformable convolution as an implicit GEMM: a block samples one tap of its pixels into shared memory and
// multiplies by the weights, without a column buffer. docs/kernels.md explains the notation.
#include "deform_conv.h"
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
__device__ __forceinline__ Depth first_depth(const DeformConv& p, int begin) {
  const int offset_group = begin / p.offset_channels();
  return {offset_group, 0, begin, min(begin + p.group_channels(), (offset_group + 1) * p.offset_channels()), 0};
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

template <class T, int kM, int kN>
struct Stages {
  unsigned char a[2][Tile<T, kM, true>::kBytes], b[2][Tile<T, kN, true>::kBytes];
  Neighbors<kM> neighbors[2];
};

template <class T, bool kTensor, int kM, int kN>
__global__ void __launch_bounds__(kThreads, kM == 128 ? (BKD_ARCH >= 800 ? 2 : 1) : 3)
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
  Depth next = first_depth(p, begin);
  compute(next);
  compute_next(next);
  __syncthreads();
  copy_weights(next, 0);
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    fetch(next, part);
    put(next, part, 0);
  }
  for (int buffer = 0;; buffer ^= 1) {
    next_depth<T>(p, begin, next);
    wait_for_copies<0>();
    __syncthreads();
    if (more(next)) {
      copy_weights(next, buffer ^ 1);
      compute_next(next);
    }
#pragma unroll 1  // to save registers
    for (int part = 0; part < kParts; ++part) {
      if (more(next)) fetch(next, part);
#pragma unroll
      for (int step = part * kSteps / kParts; step < (part + 1) * kSteps / kParts; ++step) {
        multiply_step<T, kTensor, A, B>(acc, shared.a[buffer], shared.b[buffer], step);
      }
      if (more(next)) put(next, part, buffer ^ 1);
    }
    if (!more(next)) break;
  }

  const T* bias = static_cast<const T*>(p.bias);
  T* output = static_cast<T*>(p.output);
  acc.pairs([&](int row, int column, float first, float second) {
    const int pixel = first_pixel + row, within = first_output + column;
    if (pixel >= p.pixels || within >= p.group_outputs()) return;
    const int channel = group * p.group_outputs() + within;
    const bool both = within + 1 < p.group_outputs();
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

template <class T, bool kTensor, int kM, int kN>
void start(const DeformConv& p, const Device& device) {
  launch("deform_conv", &deform_conv_kernel<T, kTensor, kM, kN>, blocks_for(p.pixels, kM),
         p.groups * blocks_for(p.group_outputs(), kN), 1, kThreads, 0, device, p);
}

template <class T, bool kTensor>
void choose(const DeformConv& p, const Device& device) {
  // Large tiles need the fewest reads; small ones keep all multiprocessors busy.
  const int64_t blocks = blocks_for(p.pixels, 128) * p.groups * blocks_for(p.group_outputs(), 128);
  if (p.group_outputs() > 64 && blocks >= 2 * device.multiprocessors) {
    start<T, kTensor, 128, 128>(p, device);
  } else {
    start<T, kTensor, 64, 64>(p, device);
  }
}

}  // namespace

void deform_conv(const DeformConv& p, Type type, bool tf32, const Device& device) {
  if (type == Type::kHalf) return choose<Half, true>(p, device);
  if (type == Type::kBFloat) return choose<BFloat, true>(p, device);
  if (tf32) return choose<float, true>(p, device);
  choose<float, false>(p, device);
}

}  // namespace bkd
