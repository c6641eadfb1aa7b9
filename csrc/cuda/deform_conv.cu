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
};
template <class T>
__device__ __forceinline__ int steps_of(int channels) {
  return (channels + kDepth<T> - 1) / kDepth<T>;
}

// A window: the steps of one offset group whose neighbours the tables hold. Mostly all.
struct Window {
  int taps, steps;
};
// The window that starts at `d`. left: the steps of the block from there.
template <class T>
__device__ __forceinline__ Window window_at(const DeformConv& p, const Depth& d, int left) {
  const int most = min(p.plan.tables, p.sampling.taps - d.tap);
  Window result{0, 0};
  for (int channel = d.channel; result.taps < most && result.steps < left; ++result.taps, channel = d.first) {
    result.steps += steps_of<T>(d.last - channel);
  }
  result.steps = min(result.steps, left);
  return result;
}
// The neighbours of all taps of a window that starts at `d`, by kM pixels. Their weights are times `scale`.
template <class T, int kM, class Table>
__device__ __forceinline__ void compute_tables(const DeformConv& p, const Depth& d, const Window& window,
                                               int first_pixel, Table* tables, float scale) {
  for (int i = threadIdx.x; i < window.taps * kM; i += kThreads) {
    const int row = i % kM, pixel = first_pixel + row;
    tables[i / kM].template compute<T>(row, p.sampling, pixel, pixel < p.pixels, d.offset_group, d.tap + i / kM, false,
                                       scale);
  }
}
// The position after `step` steps in the group whose channels start at `begin`. Returns all steps before it: of the
// whole group for a `step` beyond.
template <class T>
__device__ __forceinline__ int seek(const DeformConv& p, int begin, Depth& d, int step) {
  const int end = begin + p.group_channels;
  d = {begin / p.offset_channels, 0, begin, begin, begin};
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

// A thread's position in a window.
template <class T>
struct Step {
  int tap, channel;
  int first, beyond;  // its first channel at a tap, and the one after the steps of the tap
  int last;           // of the channels

  __device__ __forceinline__ explicit Step(const Depth& d) : tap(d.tap), channel(d.channel + own()) {
    first = d.first + own(), beyond = d.last + own(), last = d.last;
    keep(channel), keep(first), keep(beyond);
  }
  static __device__ __forceinline__ int own() { return threadIdx.x % kChunks * kVector<T>; }
  __device__ __forceinline__ bool inside() const { return channel < last; }
  __device__ __forceinline__ void next() {
    channel += kDepth<T>;
    wrap_at(beyond, first, channel, tap);
  }
};

// Copies the weights of kN outputs. Those beyond a group's are copies of its last, whose sums are not stored.
template <class T, int kN>
struct Weights {
  static constexpr int kRows = kN / kRowsAtOnce;  // of a thread
  const T* from;                                  // the thread's first chunk, at channel 0 of tap 0
  int beyond[kRows];                              // chunks from there to its other rows

  __device__ __forceinline__ Weights(const DeformConv& p, int group, int first_output) {
    const int own = threadIdx.x / kChunks, last = p.group_outputs - first_output - 1;
    const int64_t depth = int64_t{p.sampling.taps} * p.group_channels;
    from = static_cast<const T*>(p.weight) + (group * p.group_outputs + first_output + min(own, last)) * depth -
           group * p.group_channels;
    keep(from);
#pragma unroll
    for (int i = 1; i < kRows; ++i) {
      beyond[i] = static_cast<int>((min(own + i * kRowsAtOnce, last) - min(own, last)) * (depth / kVector<T>));
      keep(beyond[i]);
    }
  }
  // target: of the thread's first chunk, in shared memory.
  __device__ __forceinline__ void copy(const DeformConv& p, const Step<T>& at, bool valid, int target) const {
    const T* own = from + (at.tap * p.group_channels + at.channel);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      copy_async(shared_origin() + target + i * kRowsAtOnce * kDepthBytes,
                 own + (i ? int64_t{beyond[i]} * kVector<T> : 0), valid);
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
  Step<T> step;
  int entry;   // of the thread's first row in the table of tap 0, in shared memory
  int target;  // of its first chunk
  CornerValues<T> corners[kInFlight]{};
  const T* input;
  const Table* table;  // from the thread's first row on
  bool valid;          // the thread has channels in this step

  // tables, tile: offsets in shared memory of the tables of the window that starts at `start`, and of the first buffer.
  __device__ __forceinline__ Samples(const DeformConv& p, const Depth& start, int tables, int tile)
      : p(p), step(start) {
    const int row = threadIdx.x / kChunks;
    entry = tables - start.tap * static_cast<int>(sizeof(Table)) + row * 16;
    target = tile + Target::chunk(row, threadIdx.x % kChunks);
    keep(entry), keep(target);
    locate();
  }
  __device__ __forceinline__ void locate() {
    input = static_cast<const T*>(p.input) + step.channel;
    table = reinterpret_cast<const Table*>(shared_origin() + entry + step.tap * static_cast<int>(sizeof(Table)));
    valid = step.inside();
  }
  __device__ __forceinline__ void next(bool) {
    step.next();
    locate();
  }
  __device__ __forceinline__ void fetch(int turn) {
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int at = (turn * kInFlight + i) * kRowsAtOnce;
      corners[i].template fetch<true>(input, load_shared<uint4>(&table->pixel[at]), p.input_line, valid);
    }
  }
  __device__ __forceinline__ void put(int turn, int buffer) {
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int at = (turn * kInFlight + i) * kRowsAtOnce;
      const auto weight = load_shared<typename Table::Weight>(&table->weight[at]);
      store_shared(shared_origin() + target + buffer + at * Target::kStride, corners[i].template sums<false>(weight));
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
      Policy::kStages * (A::kBytes + B::kBytes) == Policy::kStageBytes && sizeof(Table) <= Policy::kTableBytes,
      "the policy sizes shared memory");
  const int a = dynamic_offset(), b = a + Policy::kStages * A::kBytes, tables = a + Policy::kStageBytes;
  const int output_tiles = (p.group_outputs + kN - 1) / kN;
  const int group = blockIdx.y / output_tiles, first_output = blockIdx.y % output_tiles * kN;  // of the group
  const int first_pixel = blockIdx.x * kM;
  int begin = group * p.group_channels;

  Depth at;
  const auto steps_before = [&](unsigned part) {
    return static_cast<int>(int64_t{seek<T>(p, begin, at, 0x7fffffff)} * part / p.plan.parts);
  };
  const Weights<T, kN> weights(p, group, first_output);
  AccumulatorFragment<kM, kN> acc;
  acc.clear();
  const LaneOffsets<A, B, decltype(acc)> lane(a, b);
  for (int left = steps_before(blockIdx.z + 1) - steps_before(blockIdx.z); left > 0;) {
    keep(begin);  // so that what follows from it is worked out again, and takes no register in the main loop
    seek<T>(p, begin, at, steps_before(blockIdx.z + 1) - left);
    const Window window = window_at<T>(p, at, left);
    compute_tables<T, kM>(p, at, window, first_pixel, reinterpret_cast<Table*>(dynamic_shared() + Policy::kStageBytes),
                          kTensor && sizeof(T) == 4 && kHasTensorCores<T> ? kTf32Rounding : 1);
    __syncthreads();
    left -= window.steps;
    static_assert(Policy::kStages == 2, "samples and copies are of the same step");
    Sampler samples(p, at, tables, a);
    const auto copy = [&](int stage, bool) {
      weights.copy(p, samples.step, samples.valid, samples.target + b - a + stage);
    };
    const auto multiply = [&](int turn, int stage, int buffer) {
      constexpr int kEach = kSteps / Sampler::kTurns;
#pragma unroll
      for (int step = turn * kEach; step < (turn + 1) * kEach; ++step) {
        multiply_step<T, kTensor, A, B>(acc, lane, shared_origin() + buffer, shared_origin() + stage, step);
      }
    };
    run_pipeline<Policy::kStages, B::kBytes, A::kBytes>(window.steps, copy, samples, multiply);
    if (left > 0) __syncthreads();  // before tables and stages are used again
  }
  const int own_group = begin / p.group_channels;
  store_tile<T>(p, acc, own_group, (static_cast<int>(blockIdx.y) - own_group * output_tiles) * kN, first_pixel);
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
  if (p.plan.rows == 128 && p.plan.columns == 64) return start<T, kTensor, 128, 64>(p, device);
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
