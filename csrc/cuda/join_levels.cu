// Levels side by side. A thread has 4 channels of a pixel of one level, or one where channels are no multiple of 4.
#include "join_levels.h"

#include <algorithm>

#include "interpolation.cuh"

namespace bkd {
namespace {

constexpr int kThreads = 256;

// sum += factor * x
template <int kCount>
__device__ __forceinline__ void add(Vec<float, kCount>& sum, float factor, const Vec<float, kCount>& x) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) sum.value[i] += factor * x.value[i];
}

// blockIdx.y: the level; threads beyond its numbers have nothing to do. blockIdx.z: the image, or the first of several.
template <int kCount>
__global__ void __launch_bounds__(kThreads, 4) join_levels_kernel(const __grid_constant__ JoinLevels p) {
  const JoinLevels::Level& level = p.level[blockIdx.y];
  const unsigned plane = static_cast<unsigned>(p.height) * p.width, channels = level.channels;
  const unsigned first = (blockIdx.x * kThreads + threadIdx.x) * kCount;
  if (first >= plane * channels) return;
  const unsigned pixel = first / channels, channel = first - pixel * channels;
  const int y = static_cast<int>(pixel / p.width), x = static_cast<int>(pixel) - y * p.width;
  const float* from = level.x + channel;
  auto at = [&](int row, int column) {
    return load<Vec<float, kCount>>(from + (static_cast<unsigned>(row) * level.width + column) * channels);
  };
  for (int64_t image = blockIdx.z; image < p.images; image += gridDim.z) {
    from = level.x + image * level.height * level.width * channels + channel;
    Vec<float, kCount> sum = {};
    if (level.block_height) {
      const int top = y * level.block_height, bottom = min(top + level.block_height, level.height);
      const int left = x * level.block_width, right = min(left + level.block_width, level.width);
      const float factor = level.factor / static_cast<float>((bottom - top) * (right - left));
      for (int row = top; row < bottom; ++row) {
        for (int column = left; column < right; ++column) add(sum, factor, at(row, column));
      }
    } else {
      const Interpolation row = interpolation(y, p.height, level.height, false),
                          column = interpolation(x, p.width, level.width, false);
      const float upper = level.factor * (1 - row.fraction), lower = level.factor * row.fraction;
      add(sum, upper * (1 - column.fraction), at(row.first, column.first));
      add(sum, upper * column.fraction, at(row.first, column.second));
      add(sum, lower * (1 - column.fraction), at(row.second, column.first));
      add(sum, lower * column.fraction, at(row.second, column.second));
    }
    store(p.output + (image * plane + pixel) * p.channels + level.first + channel, sum);
  }
}

}  // namespace

void join_levels(const JoinLevels& p, const Device& device) {
  int64_t numbers = 0;
  bool whole = p.channels % 4 == 0;
  for (int i = 0; i < p.levels; ++i) {
    numbers = std::max(numbers, int64_t{p.height} * p.width * p.level[i].channels);
    whole = whole && p.level[i].channels % 4 == 0 && p.level[i].first % 4 == 0;
  }
  auto with = [&](auto kernel, int count) {
    launch("join_levels", kernel, blocks_for(numbers, int64_t{kThreads} * count), p.levels,
           std::min<int64_t>(p.images, kMaxGrid), kThreads, 0, device, p);
  };
  if (whole) {
    with(&join_levels_kernel<4>, 4);
  } else {
    with(&join_levels_kernel<1>, 1);
  }
}

}  // namespace bkd
