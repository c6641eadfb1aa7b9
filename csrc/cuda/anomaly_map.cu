// The anomaly map. One kernel computes the distances of all levels in one pass over the features; another
// upsamples, fuses and smooths along rows; a third smooths along columns. The one map in between stays in L2.
#include "anomaly_map.h"

#include <algorithm>

#include "interpolation.cuh"
#include "pairs.cuh"

namespace bkd {
namespace {

constexpr int kThreads = 256;

constexpr float kMinDistance = 1e-6f;  // that is raised to a power

// blockIdx.y: the level. Blocks beyond its pixels have nothing to do.
template <class T, bool kFirst, int kBranches>
__global__ void __launch_bounds__(kThreads) distances_kernel(const __grid_constant__ Distances p) {
  const Distances::Level& level = p.level[blockIdx.y];
  if (int64_t{blockIdx.x} * kPixels >= level.pair.vectors()) return;  // the whole block
  sum_channels<T, kFirst, kBranches>(level.pair, [&](int64_t vector, const ChannelSums<kBranches>& sums) {
    float total = p.add ? load<float>(level.output + vector) : 0;
#pragma unroll
    for (int b = 0; b < kBranches; ++b) {
      if (b >= level.pair.branches) break;
      const float direction = 1 - cosine(sums.dot[b], sums.teacher, sums.student[b]),
                  value = sums.square[b] / level.channels;
      total += level.weight[b] * ((1 - p.value_share) * direction + p.value_share * value);
      if (level.statistics) {
        float* to = level.statistics + 3 * b * level.pair.vectors() + vector;
        store(to, sums.dot[b]);
        store(to + level.pair.vectors(), sums.teacher);
        store(to + 2 * level.pair.vectors(), sums.student[b]);
      }
    }
    if (p.raise && level.exponent != 1) {
      total = powf(total < kMinDistance ? kMinDistance : total, level.exponent);  // NaN stays
    }
    store(level.output + vector, total);
  });
}

// Reflect an index at the borders, repeatedly if needed.
__device__ __forceinline__ int reflected(int at, int length) {
  const int within = (at % (2 * length) + 2 * length) % (2 * length);
  return within < length ? within : 2 * length - 1 - within;
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
  int64_t vectors = 0;
  for (int i = 0; i < p.levels; ++i) vectors = std::max(vectors, p.level[i].pair.vectors());
  auto with = [&](auto kernel) {
    launch("distances", kernel, blocks_for(vectors, kPixels), p.levels, 1, kThreads, 0, device, p);
  };
  if (p.level[0].pair.branches == 1) {
    with(&distances_kernel<T, kFirst, 1>);
  } else if (p.level[0].pair.branches == 2) {
    with(&distances_kernel<T, kFirst, 2>);
  } else {
    with(&distances_kernel<T, kFirst, kMaxBranches>);
  }
}

}  // namespace

void distances(const Distances& p, Type type, const Device& device) {
  dispatch(type, [&](auto zero) {
    using T = decltype(zero);
    p.level[0].pair.channels_first ? start<T, true>(p, device) : start<T, false>(p, device);
  });
}

void anomaly_map(const AnomalyMap& p, const Device& device) {
  const int64_t columns = blocks_for(p.width, kThreads), images = std::min(p.images, kMaxGrid);
  const size_t weights = (p.radius + 1) * sizeof(float), values = (kThreads + 2 * p.radius) * sizeof(float);
  launch("map_rows", &map_rows_kernel, columns, p.height, images, kThreads, weights + values, device, p);
  if (p.radius) launch("map_columns", &map_columns_kernel, columns, p.height, images, kThreads, weights, device, p);
}

}  // namespace bkd
