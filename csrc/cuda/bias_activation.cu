// Bias, shortcut and activation of a convolution. A thread has 16 bytes.
#include "bias_activation.h"

#include "device.cuh"

namespace bkd {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ float clamp(float value, const BiasActivation& p) {  // NaN stays
  value = value < p.low ? p.low : value;
  return value > p.high ? p.high : value;
}

// Index: of numbers; 32 bits where they suffice, since divisions of 64 bits are slow.
template <class T, class Index>
__global__ void __launch_bounds__(kThreads) bias_activation_kernel(const BiasActivation p) {
  constexpr int kCount = Pack<T>::kCount;
  const Index count = static_cast<Index>(p.count), channels = static_cast<Index>(p.channels);
  const Index first = (Index{blockIdx.x} * kThreads + threadIdx.x) * kCount;
  if (first >= count) return;
  const int number = count - first < kCount ? static_cast<int>(count - first) : kCount;
  const T *bias = static_cast<const T*>(p.bias), *residual = static_cast<const T*>(p.residual);
  const T* x = static_cast<const T*>(p.x) + first;
  T* output = static_cast<T*>(p.output) + first;
  if (p.row) {
    const Index length = static_cast<Index>(p.row), height = static_cast<Index>(p.height);
    const Index row = first / length, image = row / height;
    x = static_cast<const T*>(p.x) + int64_t{image} * p.image_stride + int64_t{row - image * height} * p.row_stride +
        (first - row * length);
  }
  float value[kCount];
  if (number == kCount) {
    const Pack<T> own = load<Pack<T>>(x);
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      const float2 pair = own.pair(i);
      value[2 * i] = pair.x, value[2 * i + 1] = pair.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) value[i] = i < number ? wide(load<T>(x + i)) : 0;
  }
  const Index run = static_cast<Index>(p.run);
  if (run == 1 && channels % kCount == 0) {
    const Pack<T> added = load<Pack<T>>(bias + first % channels);
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      const float2 pair = added.pair(i);
      value[2 * i] += pair.x, value[2 * i + 1] += pair.y;
    }
  } else {
    const Index whole = first / run;
    Index within = first - whole * run, channel = whole % channels;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      value[i] += wide(load<T>(bias + channel));
      if (++within == run) within = 0, channel = channel + 1 == channels ? 0 : channel + 1;
    }
  }
  if (number == kCount) {
    if (residual) {
      const Pack<T> added = load<Pack<T>>(residual + first);
#pragma unroll
      for (int i = 0; i < kCount / 2; ++i) {
        const float2 pair = added.pair(i);
        value[2 * i] += pair.x, value[2 * i + 1] += pair.y;
      }
    }
    Pack<T> result;
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      result.set_pair(i, make_float2(clamp(value[2 * i], p), clamp(value[2 * i + 1], p)));
    }
    store(output, result);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i >= number) continue;
      if (residual) value[i] += wide(load<T>(residual + first + i));
      store(output + i, narrow<T>(clamp(value[i], p)));
    }
  }
}

template <class T, class Index>
void start(const BiasActivation& p, const Device& device) {
  launch("bias_activation", &bias_activation_kernel<T, Index>, blocks_for(p.count, kThreads * Pack<T>::kCount), 1, 1,
         kThreads, 0, device, p);
}

}  // namespace

void bias_activation(const BiasActivation& p, Type type, const Device& device) {
  dispatch(type, [&](auto zero) {
    using T = decltype(zero);
    if (p.count <= 0x7fffffff) {
      start<T, uint32_t>(p, device);
    } else {
      start<T, int64_t>(p, device);
    }
  });
}

}  // namespace bkd
