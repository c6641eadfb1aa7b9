// Gradients of modulated deformable convolution with respect to input, offset and mask. A block has a tile of pixels,
// one tap and one offset group. For 64 channels at a time it multiplies grad by the weights into shared memory and
// reads that product once for all three gradients. Nothing is saved by the forward pass.
#include "deform_conv.h"
#include "pipeline.cuh"
#include "scatter.cuh"

namespace bkd {
namespace {

constexpr int kM = 64, kN = kTileChannels;  // pixels and channels of a tile

// Columns of a row are shifted so that adjacent rows start in different banks.
__device__ __forceinline__ int shifted(int row, int pair) { return pair ^ (row % 8 * 4); }

// A lane's channels of a row of the product.
template <bool kExact>
__device__ __forceinline__ void load_columns(float (&column)[kLaneChannels], const float2* from, int row) {
  using Lane = LaneChannels<kExact>;
  if constexpr (Lane::kAdjacent) {
    const float4 four = load_shared<float4>(from + shifted(row, Lane::at(0) / 2));
    column[0] = four.x, column[1] = four.y, column[2] = four.z, column[3] = four.w;
  } else {
#pragma unroll
    for (int i = 0; i < kLaneChannels; ++i) {
      const int at = Lane::at(i);
      column[i] = load_shared<float>(reinterpret_cast<const float*>(from + shifted(row, at / 2)) + at % 2);
    }
  }
}

template <class T>
struct Columns {
  unsigned char a[2][Tile<T, kM, true>::kBytes], b[2][Tile<T, kN, false>::kBytes];
  alignas(16) float2 columns[kM][kN / 2];
  Sample samples[kM];
};

template <class T, bool kTensor, bool kExact>
__global__ void __launch_bounds__(kThreads, BKD_ARCH >= 800 ? 2 : 1) deform_conv_backward_kernel(const DeformConv p) {
  using A = Tile<T, kM, true>;
  using B = Tile<T, kN, false>;
  using Shared = Columns<T>;
  BKD_SHARED(Shared, shared);
  const T* grad = static_cast<const T*>(p.grad);
  const T* weight = static_cast<const T*>(p.weight);
  const T* input = static_cast<const T*>(p.input);
  const int first_pixel = blockIdx.x * kM, tap = blockIdx.y, offset_group = blockIdx.z;
  const int thread = threadIdx.x, warp = thread / kWarpSize;
  constexpr int kPixelsPerWarp = kM / (kThreads / kWarpSize);  // pixels of a warp
  const float scale = kExact ? load<float>(p.grad_input.scale) : 1;

  if (thread < kM && first_pixel + thread < p.pixels) {
    const OutputPixel out = output_pixel(p.sampling, first_pixel + thread);
    shared.samples[thread] = sample_at<T>(p.sampling, out, offset_group, tap, false);
  }
  float dots[kPixelsPerWarp][2] = {};

  const int begin = offset_group * p.offset_channels, end = begin + p.offset_channels;
  for (int channel = begin; channel < end;) {
    const int group = channel / p.group_channels;
    const int last = min(min(channel + kN, end), (group + 1) * p.group_channels);  // end of this step's channels
    int step = 0;
    const auto copy = [&](int stage, bool) {
      constexpr int kChunks = kDepthBytes / 16, kRowChunks = kN / kVector<T>;
#pragma unroll
      for (int i = 0; i < kM * kChunks / kThreads; ++i) {
        const int row = (i * kThreads + thread) / kChunks, chunk = thread % kChunks;
        const int output = step * kDepth<T> + chunk * kVector<T>, pixel = first_pixel + row;
        const bool valid = pixel < p.pixels && output < p.group_outputs;
        const T* from = grad + (valid ? int64_t{pixel} * p.outputs + group * p.group_outputs + output : 0);
        copy_async(shared.a[stage] + A::chunk(row, chunk), from, valid);
      }
#pragma unroll
      for (int i = 0; i < kDepth<T> * kRowChunks / kThreads; ++i) {
        const int row = (i * kThreads + thread) / kRowChunks, chunk = thread % kRowChunks;
        const int output = step * kDepth<T> + row, own = channel + chunk * kVector<T>;
        const bool valid = output < p.group_outputs && own < last;
        const int64_t line = (int64_t{group} * p.group_outputs + output) * p.sampling.taps + tap;
        const T* from = weight + (valid ? line * p.group_channels + own - group * p.group_channels : 0);
        copy_async(shared.b[stage] + B::chunk(row, chunk), from, valid);
      }
      ++step;
    };

    AccumulatorFragment<kM, kN> acc;
    acc.clear();
    const LaneOffsets<A, B, decltype(acc)> lane;
    NoSamples samples;
    run_pipeline<2>((p.group_outputs + kDepth<T> - 1) / kDepth<T>, copy, samples, [&](int, int stage, int) {
      multiply_tiles<T, kTensor, A, B>(acc, lane, shared.a[stage], shared.b[stage]);
    });
    acc.pairs([&](int row, int column, float first, float second) {
      store_shared(&shared.columns[row][shifted(row, column / 2)], make_float2(first, second));
    });
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kPixelsPerWarp; ++i) {
      const int row = warp * kPixelsPerWarp + i;
      if (first_pixel + row >= p.pixels) continue;
      float column[kLaneChannels];
      load_columns<kExact>(column, shared.columns[row], row);
      scatter<kExact>(column, shared.samples[row], input, p.channels, channel, last - channel, p.grad_input, scale,
                      p.grad_sampling.needed(), dots[i]);
    }
    channel = last;  // the next product's barriers come before columns is overwritten
  }
  if (!p.grad_sampling.needed()) return;
#pragma unroll
  for (int i = 0; i < kPixelsPerWarp; ++i) {
    const int row = warp * kPixelsPerWarp + i;
    if (first_pixel + row >= p.pixels) continue;  // uniform across the warp
    const OutputPixel out = output_pixel(p.sampling, first_pixel + row);
    store_sampling_gradients(p.sampling, p.grad_sampling, p.offset_groups, out, offset_group, tap, shared.samples[row],
                             dots[i]);
  }
}

template <class T, bool kTensor>
void start(const DeformConv& p, const Device& device) {
  const auto kernel = p.grad_input.fixed ? &deform_conv_backward_kernel<T, kTensor, true>
                                         : &deform_conv_backward_kernel<T, kTensor, false>;
  launch("deform_conv_backward", kernel, blocks_for(p.pixels, kM), p.sampling.taps, p.offset_groups, kThreads, 0,
         device, p);
}

}  // namespace

void deform_conv_backward(const DeformConv& p, Type type, bool tf32, const Device& device) {
  if (type == Type::kHalf) return start<Half, true>(p, device);
  if (type == Type::kBFloat) return start<BFloat, true>(p, device);
  if (tf32) return start<float, true>(p, device);
  start<float, false>(p, device);
}

}  // namespace bkd
