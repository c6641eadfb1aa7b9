// The forward pass of the modulated deformable convolution on wgmma, for float16 and bfloat16 on 9.0a: samples go from
// registers into the product, weights into shared memory by bulk copies. A part of deform_conv.cu.
//
// The order of the depth within a step is free. A lane of a fragment of a has words 4 i + lane % 4 of a row's 64 bytes,
// so that what it samples, the 16 bytes of a chunk, is its fragment if word 4 i + j of the product's depth is word i of
// chunk j. The weights are brought into this order before the product, a tile for each step.
#pragma once

#include "wgmma.cuh"

namespace bkd {
namespace {

// The weights of kN outputs at one step, as the kernel below copies them. blockIdx: step, group and output tile.
template <class T, int kN>
__global__ void __launch_bounds__(kThreads) deform_conv_arrange_kernel(const DeformConv p) {
  using Target = Tile<T, kN, true>;
  const int output_tiles = (p.group_outputs + kN - 1) / kN;
  const int group = blockIdx.y / output_tiles, first_output = blockIdx.y % output_tiles * kN;  // of the group
  Depth d;
  seek<T>(p, group * p.group_channels, d, blockIdx.x);
  unsigned char* tile =
      static_cast<unsigned char*>(p.arranged) + (int64_t{blockIdx.y} * gridDim.x + blockIdx.x) * Target::kBytes;
  for (int i = threadIdx.x; i < kN * kChunks; i += kThreads) {
    const int row = i / kChunks, word = i % kChunks, output = first_output + row;
    Pack<T> chunk{};
    if (output < p.group_outputs) {
      const int64_t line = int64_t{group * p.group_outputs + output} * p.sampling.taps + d.tap;
      const T* from = static_cast<const T*>(p.weight) + line * p.group_channels + d.channel - group * p.group_channels;
#pragma unroll
      for (int j = 0; j < kChunks; ++j) {
        const int at = j * kVector<T>;
        if (d.channel + at < d.last) chunk.set_word(j, load<uint32_t>(from + at + 2 * word));
      }
    }
    store(tile + Target::chunk(row, word), chunk);
  }
}

#if BKD_WGMMA

// A lane's fragments of a for one step: rows lane / 4 and lane / 4 + 8 of its warp's 16. kHold: neighbours stay in
// registers for all steps of a tap.
template <class T, bool kHold>
struct RegisterSamples {
  using Table = Neighbors<128, T>;
  const DeformConv& p;
  Depth d;
  const Table* tables;  // of the window
  int first_tap;        // of the window
  CornerValues<T> corners[2];
  uint4 held_pixel[2], held_weight[2];

  static __device__ __forceinline__ int row(int i) {
    return threadIdx.x / kWarpSize * 16 + i * 8 + threadIdx.x % kWarpSize / kChunks;
  }
  __device__ __forceinline__ int channel() const { return d.channel + threadIdx.x % kChunks * kVector<T>; }

  __device__ __forceinline__ const Table& table() const { return tables[d.tap - first_tap]; }
  __device__ __forceinline__ uint4 pixel(int i) const {
    return kHold ? held_pixel[i] : load_shared<uint4>(&table().pixel[row(i)]);
  }
  __device__ __forceinline__ uint4 weight(int i) const {
    return kHold ? held_weight[i] : load_shared<uint4>(&table().weight[row(i)]);
  }
  __device__ __forceinline__ void hold() {
    if constexpr (kHold) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        held_pixel[i] = load_shared<uint4>(&table().pixel[row(i)]);
        held_weight[i] = load_shared<uint4>(&table().weight[row(i)]);
      }
    }
  }
  __device__ __forceinline__ void next() {
    const int before = d.tap;
    d.channel += kDepth<T>;
    wrap_at(d.last, d.first, d.channel, d.tap);
    if (d.tap != before) hold();
  }
  __device__ __forceinline__ void fetch() {
    if (channel() >= d.last) return;
    const T* input = static_cast<const T*>(p.input) + channel();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      corners[i].fetch(input, pixel(i), p.input_line);
    }
  }
  __device__ __forceinline__ void put(uint32_t (&fragments)[2][4]) {
    Pack<T> sampled[2]{};
    if (channel() < d.last) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        sampled[i] = corners[i].template sums<true>(weight(i));
      }
    }
#pragma unroll
    for (int word = 0; word < 4; ++word) {
#pragma unroll
      for (int i = 0; i < 2; ++i) fragments[word / 2][word % 2 * 2 + i] = sampled[i].word(word);
    }
  }
};

// The weights of all steps, kStages ahead. Thread 0 copies; a stage is free when all warps have multiplied by it.
template <int kStages, int kBytes>
struct WeightStages {
  const unsigned char* from;
  unsigned char* stages;
  Barrier* full;
  Barrier* empty;
  int steps;
  int step = 0, stage = 0, phase = 0;  // current
  int last_stage = 0;                  // of the step before
  int free_stage = 0, free_phase = 0;  // of the step before that

  __device__ __forceinline__ void copy(int to, int step) {
    arrive_expecting(full + to, kBytes);
    copy_bulk(stages + to * kBytes, from + int64_t{step} * kBytes, kBytes, full + to);
  }
  __device__ __forceinline__ void begin() {
    if (threadIdx.x == 0) {
      for (int i = 0; i < kStages; ++i) {
        init_barrier(full + i, 1);
        init_barrier(empty + i, kThreads / kWarpSize);
      }
      publish_barriers();
      for (int i = 0; i < kStages && i < steps; ++i) copy(i, i);
    }
    __syncthreads();
  }
  __device__ __forceinline__ const unsigned char* wait() {
    wait_for_phase(full + stage, phase);
    return stages + stage * kBytes;
  }
  // Copy over the step before the last one.
  __device__ __forceinline__ void refill() {
    if (step < 2) return;
    const int next = step - 2 + kStages;
    if (threadIdx.x == 0 && next < steps) {
      wait_for_phase(empty + free_stage, free_phase);
      copy(free_stage, next);
    }
    __syncwarp();
    if (++free_stage == kStages) free_stage = 0, free_phase ^= 1;
  }
  __device__ __forceinline__ void release_last() {
    if (threadIdx.x % kWarpSize == 0) arrive(empty + last_stage);
  }
  __device__ __forceinline__ void next() {
    ++step;
    last_stage = stage;
    if (++stage == kStages) stage = 0, phase ^= 1;
  }
};

#endif

// Without wgmma it is an empty kernel that allows no block of kThreads: a launch by mistake fails.
template <class T, int kN>
__global__ void __launch_bounds__(BKD_WGMMA ? kThreads : kWarpSize, WgmmaPolicy<kN>::kBlocks)
    deform_conv_wgmma_kernel(const DeformConv p) {
#if BKD_WGMMA
  using Policy = WgmmaPolicy<kN>;
  constexpr int kM = Policy::kM;
  using Sampler = RegisterSamples<T, (kN > 128)>;
  using Table = typename Sampler::Table;
  unsigned char* stages = dynamic_shared();
  Barrier* barriers = reinterpret_cast<Barrier*>(stages + Policy::kStages * Policy::kStageBytes);
  Table* tables = reinterpret_cast<Table*>(stages + Policy::kFixedBytes);
  const int output_tiles = (p.group_outputs + kN - 1) / kN;
  const int group = blockIdx.y / output_tiles, first_output = blockIdx.y % output_tiles * kN;  // of the group
  const int first_pixel = blockIdx.x * kM;
  const int begin = group * p.group_channels;

  Depth at;
  const int all_steps = seek<T>(p, begin, at, 0x7fffffff);
  WeightStages<Policy::kStages, Policy::kStageBytes> weights{
      static_cast<const unsigned char*>(p.arranged) + int64_t{blockIdx.y} * all_steps * Policy::kStageBytes, stages,
      barriers, barriers + Policy::kStages, all_steps};
  weights.begin();
  AccumulatorFragment<kM, kN, kThreads / kWarpSize> acc;
  acc.clear();
  for (int left = all_steps; left > 0;) {
    seek<T>(p, begin, at, all_steps - left);
    const Window window = window_at<T>(p, at, left);
    compute_tables<T, kM>(p, at, window, first_pixel, tables, 1);
    __syncthreads();
    Sampler samples{p, at, tables, at.tap};
    constexpr int kBuffers = kN > 128 ? 2 : 1;  // one is filled while the other is multiplied
    uint32_t fragments[kBuffers][2][4];
    samples.hold();
    samples.fetch();
    samples.put(fragments[0]);
    const auto multiply_step = [&](auto& own, auto& following, int step) {
      const bool more = step + 1 < window.steps;
      if (more) {
        samples.next();
        samples.fetch();
      }
      const uint64_t b = descriptor(weights.wait());
      begin_products();
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int columns = 0; columns < kN / 128; ++columns) {
          multiply_async<T>(acc.value[0] + columns * 16, own[half], b + half * 2 + columns * (128 * kDepthBytes / 16));
        }
      }
      commit_products();
      weights.refill();
      wait_for_products<kBuffers - 1>();
      if (step > 0) weights.release_last();
      if (more) samples.put(following);
      weights.next();
    };
#pragma unroll 1
    for (int step = 0; step < window.steps; step += 2) {
      multiply_step(fragments[0], fragments[kBuffers - 1], step);
      if (step + 1 < window.steps) multiply_step(fragments[kBuffers - 1], fragments[0], step + 1);
    }
    wait_for_products<0>();
    weights.release_last();
    left -= window.steps;
    if (left > 0) __syncthreads();  // before tables are used again
  }
  store_tile<T>(p, acc, group, first_output, first_pixel);
#endif
}

template <class T, int kN>
void start_wgmma(const DeformConv& p, const Device& device) {
  const int64_t tiles = p.groups * blocks_for(p.group_outputs, kN);
  launch("deform_conv_arrange", &deform_conv_arrange_kernel<T, kN>,
         p.plan.arranged / (tiles * Tile<T, kN, true>::kBytes), tiles, 1, kThreads, 0, device, p);
  launch("deform_conv_wgmma", &deform_conv_wgmma_kernel<T, kN>, blocks_for(p.pixels, WgmmaPolicy<kN>::kM), tiles, 1,
         kThreads, p.plan.shared, device, p);
}
template <class T>
void start_wgmma(const DeformConv& p, const Device& device) {
  p.plan.columns == 256 ? start_wgmma<T, 256>(p, device) : start_wgmma<T, 128>(p, device);
}

}  // namespace

// Which code the current device has shows in the block that the kernel allows.
bool has_wgmma() {
#if defined(__CUDACC__)
  cudaFuncAttributes found{};
  if (cudaFuncGetAttributes(&found, &deform_conv_wgmma_kernel<Half, 256>) != cudaSuccess) {
    cudaGetLastError();  // no code for this device at all: the launch will say so
    return false;
  }
  return found.maxThreadsPerBlock >= kThreads;
#else
  return emulated::wgmma;
#endif
}

}  // namespace bkd
