// Averaged and standardised features. A thread has 4 channels of a pixel, or one number where channels are no multiple
// of 4 or come first.
#include "standardize.h"

#include <algorithm>

#include "device.cuh"

namespace bkd {
namespace {

constexpr int kThreads = 256;

// blockIdx.y: the image, or the first of several.
template <class T, int kCount>
__global__ void __launch_bounds__(kThreads) standardize_kernel(const Standardize p) {
  const unsigned plane = static_cast<unsigned>(p.height) * p.width, numbers = plane * p.channels;
  const unsigned first = (blockIdx.x * kThreads + threadIdx.x) * kCount;
  if (first >= numbers) return;
  const unsigned pixel = first / p.channels, channel = first - pixel * p.channels;
  const int y = static_cast<int>(pixel / p.width), x = static_cast<int>(pixel) - y * p.width;
  const unsigned step = p.channels_first ? 1 : p.channels;  // between pixels
  const int radius = p.patch / 2;
  const int top = max(y - radius, 0), bottom = min(y + radius, p.height - 1);
  const int left = max(x - radius, 0), right = min(x + radius, p.width - 1);
  const float inside = static_cast<float>((bottom - top + 1) * (right - left + 1));
  const float whole = static_cast<float>(p.patch * p.patch);
  const float factor = p.border == 0 ? 1 / inside : p.border == 1 ? 1 / whole : powf(inside / whole, p.border) / inside;
  const auto mean = load<Vec<float, kCount>>(p.mean + channel), std = load<Vec<float, kCount>>(p.std + channel);
  for (int64_t image = blockIdx.y; image < p.images; image += gridDim.y) {
    const T* from = static_cast<const T*>(p.x) + image * numbers + (p.channels_first ? channel * plane : channel);
    float sum[kCount] = {};
    for (int row = top; row <= bottom; ++row) {
      for (int column = left; column <= right; ++column) {
        const auto own = load<Vec<T, kCount>>(from + (static_cast<unsigned>(row) * p.width + column) * step);
#pragma unroll
        for (int i = 0; i < kCount; ++i) sum[i] += wide(own.value[i]);
      }
    }
    Vec<float, kCount> result;
#pragma unroll
    for (int i = 0; i < kCount; ++i) result.value[i] = (sum[i] * factor - mean.value[i]) / std.value[i];
    store(p.output + image * numbers + first, result);
  }
}

template <class T, int kCount>
void start(const Standardize& p, const Device& device) {
  const int64_t numbers = int64_t{p.channels} * p.height * p.width;
  launch("standardize", &standardize_kernel<T, kCount>, blocks_for(numbers, int64_t{kThreads} * kCount),
         std::min<int64_t>(p.images, kMaxGrid), 1, kThreads, 0, device, p);
}

}  // namespace

void standardize(const Standardize& p, Type type, const Device& device) {
  dispatch(type, [&](auto zero) {
    using T = decltype(zero);
    if (p.channels_first || p.channels % 4) {
      start<T, 1>(p, device);
    } else {
      start<T, 4>(p, device);
    }
  });
}

}  // namespace bkd
