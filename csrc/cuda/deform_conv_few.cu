// Modulated deformable convolution of groups of few channels, which would leave most of a tensor core's tile empty. A
// thread samples eight channels of a pixel, and multiplies them by the weights of their groups.
#include "deform_conv_few.h"

#include "sampling.cuh"

namespace bkd {
namespace {

constexpr int kThreads = 256;

// The values of a thread's channels, from a chunk or two.
template <class T>
__device__ __forceinline__ void sample(float (&value)[kFewChannels], const T* input, const uint4& pixel,
                                       const float4& weight, uint32_t line) {
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

// chunks: of a pixel and block; a power of 2. A thread has kWidth outputs of each of its groups.
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 2 : 1)
    deform_conv_few_kernel(const DeformConvFew p, int chunks) {
  using Table = Neighbors<kThreads>;
  BKD_SHARED(Table, table);
  constexpr int kNumbers = kFewChannels * kWidth, kEach = Pack<T>::kCount;
  const Sampling& s = p.sampling;
  const int pixels = kThreads / chunks, first_pixel = blockIdx.x * pixels, thread = threadIdx.x;
  const int row = thread / chunks, first_chunk = blockIdx.y * chunks, chunk = first_chunk + thread % chunks;
  const bool active = first_pixel + row < p.pixels && chunk < p.chunks;
  // Of each pixel the block has the neighbours of `groups` offset groups and as many taps as there is room for.
  const int first_group = first_chunk / p.offset_chunks, group = chunk / p.offset_chunks;
  const int groups = min(first_chunk + chunks - 1, p.chunks - 1) / p.offset_chunks - first_group + 1;
  const int slots = kThreads / pixels / groups;
  const T* input = static_cast<const T*>(p.input) + int64_t{chunk} * kFewChannels;
  const T* weight = static_cast<const T*>(p.weight) +
                    (int64_t{blockIdx.z} * s.taps * p.chunks + chunk) * kNumbers;  // of the first tap

  float sums[kFewChannels] = {};
  for (int first = 0; first < s.taps; first += slots) {
    const int count = min(slots, s.taps - first);
    if (first) __syncthreads();
    if (thread < count * groups * pixels) {
      const int index = thread % pixels, slot = thread / pixels, pixel = first_pixel + index;
      table.template compute<T>(thread, s, pixel, pixel < p.pixels, first_group + slot % groups, first + slot / groups);
    }
    __syncthreads();
#pragma unroll 1  // to save registers
    for (int slot = 0; slot < (active ? count : 0); ++slot) {
      const int at = (slot * groups + group - first_group) * pixels + row;
      float value[kFewChannels];
      sample(value, input, load_shared<uint4>(&table.pixel[at]), load_shared<float4>(&table.weight[at]), p.input_line);
      const T* own = weight + int64_t{first + slot} * p.chunks * kNumbers;
#pragma unroll
      for (int i = 0; i < kNumbers; i += kEach) {
        const auto factors = load<Pack<T>>(own + i);
#pragma unroll
        for (int k = 0; k < kEach / 2; ++k) {
          const int output = (i + 2 * k) / kWidth, from = output / kWidth * kWidth, next = (i + 2 * k + 1) / kWidth;
          const float2 two = factors.pair(k);
          sums[output] += value[from + (i + 2 * k) % kWidth] * two.x;
          sums[next] += value[next / kWidth * kWidth + (i + 2 * k + 1) % kWidth] * two.y;
        }
      }
    }
  }
  if (!active) return;
  const T* bias = static_cast<const T*>(p.bias);
  T* output = static_cast<T*>(p.output) + int64_t{first_pixel + row} * p.outputs;
  if (p.whole) {
    const int channel = chunk * kFewChannels;
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
    const int own = (chunk - group * p.offset_chunks) * (kFewChannels / kWidth) + i / kWidth;  // in the offset group
    const int within = blockIdx.z * kWidth + i % kWidth;                                       // in the group
    if (own >= p.own_groups || within >= p.group_outputs) continue;
    const int channel = (group * p.own_groups + own) * p.group_outputs + within;
    store(output + channel, narrow<T>(sums[i] + (bias ? wide(load<T>(bias + channel)) : 0)));
  }
}

template <class T, int kWidth>
void start(const DeformConvFew& p, const Device& device) {
  int chunks = 1;
  while (chunks < p.chunks && chunks < kWarpSize) chunks *= 2;
  launch("deform_conv_few", &deform_conv_few_kernel<T, kWidth>, blocks_for(p.pixels, kThreads / chunks),
         blocks_for(p.chunks, chunks), p.rounds, kThreads, 0, device, p, chunks);
}

}  // namespace

void deform_conv_few(const DeformConvFew& p, Type type, const Device& device) {
  dispatch(type, [&](auto zero) {
    using T = decltype(zero);
    if (p.width == 1) return start<T, 1>(p, device);
    if (p.width == 2) return start<T, 2>(p, device);
    if (p.width == 4) return start<T, 4>(p, device);
    start<T, 8>(p, device);
  });
}

}  // namespace bkd
