// Bilinear sampling at one position and its derivatives: what every deformable kernel, on any device, computes.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define BKD_BOTH __host__ __device__ __forceinline__
#else
#define BKD_BOTH inline
#endif

namespace bkd {
namespace {

// The four neighbours of a position: top left, top right, bottom left, bottom right.
// pixel: y * width + x, clamped into the image. weight: 0 outside the image. by_y, by_x: derivatives of the weight.
template <class T>
struct Corners {
  int32_t pixel[4];
  T weight[4], by_y[4], by_x[4];
};

// A position without any neighbour inside the image gives four zero weights, NaN gives NaN weights.
template <class T>
BKD_BOTH Corners<T> corners(T y, T x, int32_t height, int32_t width) {
  // Beyond these nothing is inside; the clamp keeps the conversion to integers defined, and lets NaN through.
  y = y < T(-2) ? T(-2) : (y > T(height + 1) ? T(height + 1) : y);
  x = x < T(-2) ? T(-2) : (x > T(width + 1) ? T(width + 1) : x);
  const T top = std::floor(y), left = std::floor(x);
  const T down = y - top, right = x - left;
  // NaN is not equal to itself: its neighbours are pixel 0.
  const int32_t row = y == y ? static_cast<int32_t>(top) : 0;
  const int32_t column = x == x ? static_cast<int32_t>(left) : 0;
  Corners<T> result;
  for (int i = 0; i < 4; ++i) {
    const int below = i >> 1, beside = i & 1;
    const int32_t r = row + below, c = column + beside;
    const T inside = (r >= 0 && r < height && c >= 0 && c < width) ? T(1) : T(0);
    const T vertical = below ? down : 1 - down, horizontal = beside ? right : 1 - right;
    const int32_t clamped_r = r < 0 ? 0 : (r >= height ? height - 1 : r);
    const int32_t clamped_c = c < 0 ? 0 : (c >= width ? width - 1 : c);
    result.pixel[i] = clamped_r * width + clamped_c;
    result.weight[i] = vertical * horizontal * inside;
    result.by_y[i] = (below ? horizontal : -horizontal) * inside;
    result.by_x[i] = (beside ? vertical : -vertical) * inside;
  }
  return result;
}

}  // namespace
}  // namespace bkd
