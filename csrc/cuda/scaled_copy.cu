// Operator template. Each thread scales 16 bytes.
#include "scaled_copy.h"

#include "device.cuh"

namespace bkd {
namespace {

constexpr int kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads) scaled_copy_kernel(const ScaledCopy p) {
  constexpr int kCount = Pack<T>::kCount;
  const int64_t first = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kCount;
  const T* input = static_cast<const T*>(p.input);
  T* output = static_cast<T*>(p.output);
  if (first + kCount <= p.count) {
    Pack<T> values = load<Pack<T>>(input + first);
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      const float2 pair = values.pair(i);
      values.set_pair(i, make_float2(p.scale * pair.x, p.scale * pair.y));
    }
    store(output + first, values);
  } else {
    for (int64_t i = first; i < p.count; ++i) store(output + i, narrow<T>(p.scale * wide(load<T>(input + i))));
  }
}

}  // namespace

void scaled_copy(const ScaledCopy& p, Type type, const Device& device) {
  dispatch(type, [&](auto zero) {
    using T = decltype(zero);
    launch("scaled_copy", &scaled_copy_kernel<T>, blocks_for(p.count, kThreads * Pack<T>::kCount), 1, 1, kThreads, 0,
           device, p);
  });
}

}  // namespace bkd
