// Modulated deformable convolution as an implicit GEMM: a block samples one tap of its pixels into shared memory and
// multiplies by the weights, without a column buffer. docs/kernels.md explains the notation.
#include "deform_conv.h"

#include "conv_policy.h"
#include "pipeline.cuh"
#include "sampling.cuh"

namespace bkd {
namespace {

// Position in the depth (K) of the GEMM: kDepth channels of one tap, offset group and group.
struct Depth {
  int offset_group, tap, channel;
  int first, last;  // the channels that group and offset group share
  int table;        // of neighbours: those of the first tap of a window are in table 0
};
// To the next tap or offset group of the group whose channels end at `end`.
__device__ __forceinline__ void next_tap(const DeformConv& p, int end, Depth& d) {
  ++d.table;
  if (++d.tap == p.sampling.taps) {
    d.tap = 0;
    d.first = d.last;
    d.last = min(end, (++d.offset_group + 1) * p.offset_channels);
  }
  d.channel = d.first;
}
template <class T>
__device__ __forceinline__ void next_step(const DeformConv& p, int end, Depth& d) {
  d.channel += kDepth<T>;
  if (d.channel >= d.last) next_tap(p, end, d);
}
template <class T>
__device__ __forceinline__ int steps_of(int channels) {
  return (channels + kDepth<T> - 1) / kDepth<T>;
}
// The position after `step` steps in the group whose channels start at `begin`. Returns all steps before it: of the
// whole group for a `step` beyond.
template <class T>
__device__ __forceinline__ int seek(const DeformConv& p, int begin, Depth& d, int step) {
  const int end = begin + p.group_channels;
  d = {begin / p.offset_channels, 0, begin, begin, begin, 0};
  int before = 0;
  for (; d.first < end; d.first = d.last, ++d.offset_group) {
    d.last = min(end, (d.offset_group + 1) * p.offset_channels);
    const int steps = steps_of<T>(d.last - d.first);  // of a tap
    if (step - before < steps * p.sampling.taps) {
      d.tap = (step - before) / steps;
      d.channel = d.first + (step - before - d.tap * steps) * kDepth<T>;
      return step;
    }
    before += steps * p.sampling.taps;
  }
  return before;
}

// Interpolates in T, two numbers at once, where the device multiplies them so; else in float32.
template <class T>
constexpr bool kPairedSums = std::is_same<T, Half>::value || (std::is_same<T, BFloat>::value && BKD_ARCH >= 800);

constexpr int kChunks = kDepthBytes / 16, kRowsAtOnce = kThreads / kChunks;  // a thread has one chunk of a row

// Copies the weights of kN outputs.
template <class T, int kN>
struct Weights {
  using Target = Tile<T, kN, true>;
  const T* from;   // the thread's first chunk, at channel 0 of tap 0
  int64_t stride;  // between the rows of a thread
  int rows, chunk, target;

  __device__ __forceinline__ Weights(const DeformConv& p, int group, int first_output) {
    const int row = threadIdx.x / kChunks, depth = p.sampling.taps * p.group_channels;
    chunk = threadIdx.x % kChunks * kVector<T>;
    from = static_cast<const T*>(p.weight) + int64_t{group * p.group_outputs + first_output + row} * depth + chunk -
           group * p.group_channels;
    stride = int64_t{kRowsAtOnce} * depth;
    rows = p.group_outputs - first_output - row;
    target = Target::chunk(row, threadIdx.x % kChunks);
    keep(from), keep(target), keep(rows), keep(chunk);
  }
  __device__ __forceinline__ void copy(const DeformConv& p, const Depth& d, unsigned char* tile) const {
    const T* own = from + (d.tap * p.group_channels + d.channel);
    const bool inside = d.channel + chunk < d.last;
#pragma unroll
    for (int i = 0; i < kN / kRowsAtOnce; ++i) {
      copy_async(tile + target + i * kRowsAtOnce * Target::kStride, own + i * stride, inside && i * kRowsAtOnce < rows);
    }
  }
};

// Samples kM pixels. kInFlight: chunks of a thread whose neighbours are loaded together.
template <class T, bool kTensor, int kM, int kInFlight>
struct Samples {
  using Target = Tile<T, kM, true>;
  using Table = Neighbors<kM, std::conditional_t<kPairedSums<T>, T, float>>;
  static constexpr int kParts = kM / kRowsAtOnce, kTurns = kParts / kInFlight;
  const DeformConv& p;
  const Depth& copied;  // where the copies are: a step ahead
  const Table* tables;
  unsigned char* tile;
  CornerValues<T> corners[kInFlight];
  const Table* table;
  int channel;
  bool valid;  // the thread has channels in this step

  __device__ __forceinline__ Samples(const DeformConv& p, const Depth& copied, const Table* tables, unsigned char* tile)
      : p(p), copied(copied), tables(tables), tile(tile) {
    next(true);
  }
  __device__ __forceinline__ int row() const { return threadIdx.x / kChunks; }
  __device__ __forceinline__ void next(bool more) {
    channel = copied.channel + threadIdx.x % kChunks * kVector<T>;
    table = tables + copied.table;
    valid = more && channel < copied.last;
  }
  __device__ __forceinline__ void fetch(int turn) {
    if (!valid) return;
    const T* input = static_cast<const T*>(p.input) + channel;
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int at = row() + (turn * kInFlight + i) * kRowsAtOnce;
      corners[i].fetch(input, load_shared<uint4>(&table->pixel[at]), p.input_line);
    }
  }
  __device__ __forceinline__ void put(int turn, int buffer) {
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int at = row() + (turn * kInFlight + i) * kRowsAtOnce;
      Pack<T> sampled{};
      if (valid) sampled = corners[i].template sums<false>(load_shared<typename Table::Weight>(&table->weight[at]));
      store_shared(tile + buffer * Target::kBytes + Target::chunk(row(), threadIdx.x % kChunks) +
                       (turn * kInFlight + i) * kRowsAtOnce * Target::kStride,
                   sampled);
    }
  }
};

// Store a tile: the output, or the sums of one part of the depth.
template <class T, class Accumulators>
__device__ __forceinline__ void store_tile(const DeformConv& p, const Accumulators& acc, int group, int first_output,
                                           int first_pixel) {
  acc.columns([&](int column, auto each_row) {
    const int within = first_output + column, channel = group * p.group_outputs + within;
    if (within >= p.group_outputs) return;
    const bool both = within + 1 < p.group_outputs, adjacent = both && (p.outputs | channel) % 2 == 0;
    const auto store_rows = [&](auto* to, float bias_first, float bias_second) {
      using Number = std::remove_pointer_t<decltype(to)>;
      each_row([&](int row, float first, float second) {
        if (first_pixel + row >= p.pixels) return;
        Number* own = to + int64_t{first_pixel + row} * p.outputs + channel;
        const Vec2<Number> pair{narrow<Number>(first + bias_first), narrow<Number>(second + bias_second)};
        if (adjacent) return store(own, pair);
        store(own, pair.value[0]);
        if (both) store(own + 1, pair.value[1]);
      });
    };
    if (p.plan.parts > 1) return store_rows(p.partial + int64_t{blockIdx.z} * p.pixels * p.outputs, 0, 0);
    const T* bias = static_cast<const T*>(p.bias);
    const float bias_first = bias ? wide(load<T>(bias + channel)) : 0;
    const float bias_second = bias && both ? wide(load<T>(bias + channel + 1)) : 0;
    store_rows(static_cast<T*>(p.output), bias_first, bias_second);
  });
}

template <class T, bool kTensor, int kM, int kN>
__global__ void __launch_bounds__(kThreads, ConvPolicy<kM, kN>::blocks(BKD_ARCH, sizeof(T), kTensor))
    deform_conv_kernel(const DeformConv p) {
  using Policy = ConvPolicy<kM, kN>;
  using A = Tile<T, kM, true>;
  using B = Tile<T, kN, true>;
  using Sampler = Samples<T, kTensor, kM, Policy::in_flight(BKD_ARCH, sizeof(T))>;
  using Table = typename Sampler::Table;
  static_assert(
      2 * A::kBytes + Policy::kStages * B::kBytes == Policy::kStageBytes && sizeof(Table) <= Policy::kTableBytes,
      "the policy sizes shared memory");
  unsigned char* a = dynamic_shared();
  unsigned char* b = a + 2 * A::kBytes;
  Table* tables = reinterpret_cast<Table*>(a + Policy::kStageBytes);
  const int output_tiles = (p.group_outputs + kN - 1) / kN;
  const int group = blockIdx.y / output_tiles, first_output = blockIdx.y % output_tiles * kN;  // of the group
  const int first_pixel = blockIdx.x * kM;
  const int begin = group * p.group_channels, end = begin + p.group_channels, taps = p.sampling.taps;

  Depth at;
  const int64_t all_steps = seek<T>(p, begin, at, 0x7fffffff);
  const int first_step = static_cast<int>(all_steps * blockIdx.z / p.plan.parts);
  int left = static_cast<int>(all_steps * (blockIdx.z + 1) / p.plan.parts) - first_step;
  seek<T>(p, begin, at, first_step);

  const Weights<T, kN> weights(p, group, first_output);
  AccumulatorFragment<kM, kN> acc;
  acc.clear();
  const LaneOffsets<A, B, decltype(acc)> lane;
  // A window is the steps whose neighbours the tables hold: mostly all.
  while (left > 0) {
    Depth next = at;
    int steps = 0, count = 0;
    for (; count < p.plan.tables && steps < left; ++count) {
      steps += steps_of<T>(next.last - next.channel);
      next_tap(p, end, next);
    }
    steps = min(steps, left);
    for (int i = threadIdx.x; i < count * kM; i += kThreads) {
      const int slot = at.offset_group * taps + at.tap + i / kM, row = i % kM, pixel = first_pixel + row;
      tables[i / kM].template compute<T>(row, p.sampling, pixel, pixel < p.pixels, slot / taps, slot % taps, false,
                                         kTensor && sizeof(T) == 4 && kHasTensorCores<T> ? kTf32Rounding : 1);
    }
    __syncthreads();
    // Samples are a step behind the copies, so that one position is worked out for both.
    static_assert(Policy::kStages == 3, "copies are two steps ahead");
    Depth copied = at;
    Sampler samples(p, copied, tables, a);
    const auto copy = [&](int stage, bool first) {
      if (!first) next_step<T>(p, end, copied);
      weights.copy(p, copied, b + stage * B::kBytes);
    };
    run_pipeline<Policy::kStages>(steps, copy, samples, [&](int turn, int stage, int buffer) {
      constexpr int kEach = kSteps / Sampler::kTurns;
#pragma unroll
      for (int step = turn * kEach; step < (turn + 1) * kEach; ++step) {
        multiply_step<T, kTensor, A, B>(acc, lane, a + buffer * A::kBytes, b + stage * B::kBytes, step);
      }
    });
    left -= steps;
    at = copied;
    next_step<T>(p, end, at);  // as `next`, which would take registers meanwhile
    at.table = 0;
    if (left > 0) __syncthreads();  // before tables and stages are used again
  }
  store_tile<T>(p, acc, group, first_output, first_pixel);
}

}  // namespace
}  // namespace bkd

#include "deform_conv_wgmma.cuh"

namespace bkd {
namespace {

// The output from the parts of the depth: their sum in order, and the bias. A thread has kEach numbers.
template <class T, int kEach>
__global__ void __launch_bounds__(kThreads) deform_conv_sum_kernel(const DeformConv p) {
  const int count = p.pixels * p.outputs, first = (blockIdx.x * kThreads + threadIdx.x) * kEach;
  if (first >= count) return;
  auto sum = load<Vec<float, kEach>>(p.partial + first);
#pragma unroll 4
  for (int part = 1; part < p.plan.parts; ++part) {
    const auto own = load<Vec<float, kEach>>(p.partial + int64_t{part} * count + first);
#pragma unroll
    for (int i = 0; i < kEach; ++i) sum.value[i] += own.value[i];
  }
  const T* bias = static_cast<const T*>(p.bias);
  Vec<T, kEach> result;
  const int channel = first % p.outputs;  // outputs are whole kEach, so that a thread has those of one pixel
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    result.value[i] = narrow<T>(sum.value[i] + (bias ? wide(load<T>(bias + channel + i)) : 0));
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
         p.groups * blocks_for(p.group_outputs, kN), p.plan.parts, kThreads, p.plan.shared, device, p);
  if (p.plan.parts == 1) return;
  const bool aligned = p.outputs % 4 == 0 && reinterpret_cast<uintptr_t>(p.output) % (4 * sizeof(T)) == 0;
  aligned ? start_sum<T, 4>(p, device) : start_sum<T, 1>(p, device);
}

template <class T, bool kTensor>
void choose(const DeformConv& p, const Device& device) {
  if constexpr (sizeof(T) == 2) {
    if (p.plan.arranged) return start_wgmma<T>(p, device);
  }
  if constexpr (kTensor) {
    if (p.plan.columns == 256) return start<T, kTensor, 128, 256>(p, device);
  }
  if (p.plan.rows == 128) return start<T, kTensor, 128, 128>(p, device);
  if (p.plan.columns == 128) return start<T, kTensor, 64, 128>(p, device);
  start<T, kTensor, 64, 64>(p, device);
}

}  // namespace

void deform_conv(const DeformConv& p, Type type, bool tf32, const Device& device) {
  if (type == Type::kHalf) return choose<Half, true>(p, device);
  if (type == Type::kBFloat) return choose<BFloat, true>(p, device);
  if (tf32) return choose<float, true>(p, device);
  choose<float, false>(p, device);
}

}  // namespace bkd
