// The anomaly map. One kernel per level computes distances in one pass over the features; another upsamples, fuses and
// smooths along rows; a third smooths along columns. The one map in between stays in L2.
#include "anomaly_map.h"

#include <algorithm>

#include "pairs.cuh"

namespace bkd {
namespace {

constexpr int kThreads = 256;

template <class T, bool kFirst, int kBranches>
__global__ void __launch_bounds__(kThreads) distances_kernel(const Distances p) {
  sum_channels<T, kFirst, kBranches>(p.pair, [&](int64_t vector, const ChannelSums<kBranches>& sums) {
    float total = p.add ? load<float>(p.output + vector) : 0;
#pragma unroll
    for (int b = 0; b < kBranches; ++b) {
      if (b >= p.pair.branches) break;
      const float direction = 1 - cosine(sums.dot[b], sums.teacher, sums.student[b]),
                  value = sums.square[b] / p.channels;
      total += p.weight[b] * ((1 - p.value_share) * direction + p.value_share * value);
      if (p.statistics) {
        float* to = p.statistics + 3 * b * p.pair.vectors() + vector;
        store(to, sums.dot[b]);
        store(to + p.pair.vectors(), sums.teacher);
        store(to + 2 * p.pair.vectors(), sums.student[b]);
      }
    }
    store(p.output + vector, total);
  });
}

// Reflect an index at the borders, repeatedly if needed.
__device__ __forceinline__ int reflected(int at, int length) {
  const int within = (at % (2 * length) + 2 * length) % (2 * length);
  return within < length ? within : 2 * length - 1 - within;
}

// Linear interpolation between two pixels of a level.
struct Interpolation {
  int first, second;
  float fraction;  // of the second
};
__device__ __forceinline__ Interpolation interpolation(int at, int length, int level_length, bool align_corners) {
  float x;
  if (align_corners) {
    x = length > 1 ? static_cast<float>(at) * (static_cast<float>(level_length - 1) / static_cast<float>(length - 1))
                   : 0.0f;
  } else {
    const float ratio = static_cast<float>(level_length) / static_cast<float>(length);
    x = fmaxf((static_cast<float>(at) + 0.5f) * ratio - 0.5f, 0);
  }
  const int first = min(static_cast<int>(x), level_length - 1);
  return {first, min(first + 1, level_length - 1), x - static_cast<float>(first)};
}

__device__ __forceinline__ float fused(const AnomalyMap& p, int image, int y, int x) {
  float total = 0;
  for (int level = 0; level < p.levels; ++level) {
    const int height = p.level_height[level], width = p.level_width[level];
    const Interpolation row = interpolation(y, p.height, height, p.align_corners),
                        column = interpolation(x, p.width, width, p.align_corners);
    const float* upper = p.distances[level] + (int64_t{image} * height + row.first) * width;
    const float* lower = p.distances[level] + (int64_t{image} * height + row.second) * width;
    const float above = load<float>(upper + column.first) * (1 - column.fraction) +
                        load<float>(upper + column.second) * column.fraction;
    const float below = load<float>(lower + column.first) * (1 - column.fraction) +
                        load<float>(lower + column.second) * column.fraction;
    const float value = above * (1 - row.fraction) + below * row.fraction;
    total = level == 0 ? value : (p.product ? total * value : total + value);
  }
  return total;
}

__device__ __forceinline__ void fill_weights(const AnomalyMap& p, float* weights) {
  for (int i = threadIdx.x; i <= p.radius; i += kThreads) {
    const float steps = static_cast<float>(i) / p.sigma;
    store_shared(weights + i, i == 0 ? p.scale : p.scale * expf(-0.5f * steps * steps));
  }
}

// A block has kThreads pixels of a row, and holds their fused values and halo in shared memory.
__global__ void __launch_bounds__(kThreads) map_rows_kernel(const AnomalyMap p) {
  float* weights = reinterpret_cast<float*>(dynamic_shared());
  float* values = weights + p.radius + 1;
  const int first = blockIdx.x * kThreads, y = blockIdx.y, x = first + threadIdx.x;
  for (int image = blockIdx.z; image < p.images; image += gridDim.z) {
    fill_weights(p, weights);
    const int count = min(kThreads, p.width - first) + 2 * p.radius;
    for (int i = threadIdx.x; i < count; i += kThreads) {
      store_shared(values + i, fused(p, image, y, reflected(first - p.radius + i, p.width)));
    }
    __syncthreads();
    if (x < p.width) {
      float total = load_shared<float>(weights) * load_shared<float>(values + threadIdx.x + p.radius);
      for (int i = 1; i <= p.radius; ++i) {
        const float* middle = values + threadIdx.x + p.radius;
        total += load_shared<float>(weights + i) * (load_shared<float>(middle - i) + load_shared<float>(middle + i));
      }
      store((p.radius ? p.rows : p.output) + (int64_t{image} * p.height + y) * p.width + x, total);
    }
    __syncthreads();  // before the values of the next image
  }
}

__global__ void __launch_bounds__(kThreads) map_columns_kernel(const AnomalyMap p) {
  float* weights = reinterpret_cast<float*>(dynamic_shared());
  fill_weights(p, weights);
  __syncthreads();
  const int x = blockIdx.x * kThreads + threadIdx.x, y = blockIdx.y;
  if (x >= p.width) return;
  for (int image = blockIdx.z; image < p.images; image += gridDim.z) {
    const float* column = p.rows + int64_t{image} * p.height * p.width + x;
    auto at = [&](int row) { return load<float>(column + int64_t{reflected(row, p.height)} * p.width); };
    float total = load_shared<float>(weights) * at(y);
    for (int i = 1; i <= p.radius; ++i) total += load_shared<float>(weights + i) * (at(y - i) + at(y + i));
    store(p.output + (int64_t{image} * p.height + y) * p.width + x, total);
  }
}

template <class T, bool kFirst>
void start(const Distances& p, const Device& device) {
  auto with = [&](auto kernel) {
    launch("distances", kernel, blocks_for(p.pair.vectors(), kPixels), 1, 1, kThreads, 0, device, p);
  };
  if (p.pair.branches == 1) {
    with(&distances_kernel<T, kFirst, 1>);
  } else if (p.pair.branches == 2) {
    with(&distances_kernel<T, kFirst, 2>);
  } else {
    with(&distances_kernel<T, kFirst, kMaxBranches>);
  }
}

}  // namespace

void distances(const Distances& p, Type type, const Device& device) {
  dispatch(type, [&](auto zero) {
    using T = decltype(zero);
    p.pair.channels_first ? start<T, true>(p, device) : start<T, false>(p, device);
  });
}

void anomaly_map(const AnomalyMap& p, const Device& device) {
  const int64_t columns = blocks_for(p.width, kThreads), images = std::min(p.images, 65535);
  const size_t weights = (p.radius + 1) * sizeof(float), values = (kThreads + 2 * p.radius) * sizeof(float);
  launch("map_rows", &map_rows_kernel, columns, p.height, images, kThreads, weights + values, device, p);
  if (p.radius) launch("map_columns", &map_columns_kernel, columns, p.height, images, kThreads, weights, device, p);
}

}  // namespace bkd
