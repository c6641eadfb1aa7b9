// The distillation loss: one pass over the features gives partial sums, which one block reduces in a fixed order.
#include "distillation_loss.h"

#include <algorithm>

#include "pairs.cuh"

namespace bkd {
namespace {

constexpr int kThreads = 256;

// Reduce over a block in a fixed order; the first thread gets the result.
__device__ __forceinline__ float sum_block(float x) {
  using Partial = float[kThreads / kWarpSize];
  BKD_SHARED(Partial, partial);
  x = sum_lanes(x);
  __syncthreads();  // earlier reads of `partial` are done
  if (threadIdx.x % kWarpSize == 0) store_shared(&partial[threadIdx.x / kWarpSize], x);
  __syncthreads();
  float total = 0;
  for (int i = 0; i < kThreads / kWarpSize; ++i) total += load_shared<float>(&partial[i]);
  return total;
}

template <class T, bool kFirst>
__global__ void __launch_bounds__(kThreads) loss_pixels_kernel(const DistillationLoss p) {
  float direction = 0, value = 0;
  sum_channels<T, kFirst, 1>(p.pair, [&](int64_t vector, const ChannelSums<1>& sums) {
    const int64_t vectors = p.pair.vectors();
    store(p.statistics + vector, sums.dot[0]);
    store(p.statistics + vectors + vector, sums.teacher);
    store(p.statistics + 2 * vectors + vector, sums.student[0]);
    direction = 1 - cosine(sums.dot[0], sums.teacher, sums.student[0]);
    value = sums.square[0];
  });
  direction = sum_block(direction);
  value = sum_block(value);
  if (threadIdx.x == 0)
    store(p.parts + 2 * int64_t{blockIdx.x}, direction), store(p.parts + 2 * int64_t{blockIdx.x} + 1, value);
}

// A block reduces one split of an image, in memory order.
template <class T, int kCount>
__global__ void __launch_bounds__(kThreads) loss_images_kernel(const DistillationLoss p) {
  using Vector = Vec<T, kCount>;
  const int64_t size = int64_t{p.pair.channels} * p.pair.pixels, chunks = size / kCount;
  const int64_t image = blockIdx.y + int64_t{blockIdx.z} * gridDim.y;
  if (image >= p.pair.images) return;
  const int64_t begin = chunks * blockIdx.x / p.splits, end = chunks * (blockIdx.x + 1) / p.splits;
  ChannelSums<1> sums;
  for (int64_t chunk = begin + threadIdx.x; chunk < end; chunk += kThreads) {
    const int64_t at = image * size + chunk * kCount;
    const Vector t = load<Vector>(static_cast<const T*>(p.pair.teacher) + at);
    const Vector s = load<Vector>(static_cast<const T*>(p.pair.student[0]) + at);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float x = wide(t.value[i]);
      sums.teacher += x * x;
      sums.add(0, x, wide(s.value[i]));
    }
  }
  sums.each([](float x) { return sum_block(x); });
  if (threadIdx.x == 0) {
    const float4 part = make_float4(sums.dot[0], sums.teacher, sums.student[0], sums.square[0]);
    store(p.parts + 4 * (image * p.splits + blockIdx.x), part);
  }
}

__global__ void __launch_bounds__(kThreads) loss_total_kernel(const DistillationLoss p, int64_t parts) {
  float direction = 0, value = 0;
  if (p.by_image) {
    for (int image = threadIdx.x; image < p.pair.images; image += kThreads) {
      float sums[4] = {};
      for (int split = 0; split < p.splits; ++split) {
        const float4 part = load<float4>(p.parts + 4 * (int64_t{image} * p.splits + split));
        sums[0] += part.x, sums[1] += part.y, sums[2] += part.z, sums[3] += part.w;
      }
      for (int i = 0; i < 3; ++i) store(p.statistics + int64_t{i} * p.pair.images + image, sums[i]);
      direction += 1 - cosine(sums[0], sums[1], sums[2]);
      value += sums[3];
    }
  } else {
    for (int64_t part = threadIdx.x; part < parts; part += kThreads) {
      const float2 sums = load<float2>(p.parts + 2 * part);
      direction += sums.x;
      value += sums.y;
    }
  }
  direction = sum_block(direction);
  value = sum_block(value);
  if (threadIdx.x) return;
  const float loss = direction * p.direction + value * p.value;
  store(p.loss, p.add ? load<float>(p.loss) + loss : loss);
}

template <class T, bool kFirst>
void start(const DistillationLoss& p, const Device& device) {
  if (p.by_image) {
    const int64_t y = std::min(p.pair.images, kMaxGrid);
    launch("loss_images", &loss_images_kernel < T, kFirst ? 1 : Pack<T>::kCount >, p.splits, y,
           blocks_for(p.pair.images, std::max<int64_t>(y, 1)), kThreads, 0, device, p);
  } else {
    launch("loss_pixels", &loss_pixels_kernel<T, kFirst>, loss_parts(p), 1, 1, kThreads, 0, device, p);
  }
  launch("loss_total", &loss_total_kernel, 1, 1, 1, kThreads, 0, device, p, loss_parts(p));
}

}  // namespace

int64_t loss_parts(const DistillationLoss& p) {
  return p.by_image ? int64_t{p.pair.images} * p.splits : blocks_for(p.pair.vectors(), kPixels);
}

void distillation_loss(const DistillationLoss& p, Type type, const Device& device) {
  dispatch(type, [&](auto zero) {
    using T = decltype(zero);
    p.pair.channels_first ? start<T, true>(p, device) : start<T, false>(p, device);
  });
}

}  // namespace bkd
