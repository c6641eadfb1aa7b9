// Bilinear weights of a sampling position and their derivatives, shared by the deformable kernels of every device.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace bkd {
namespace {

// The integer type of T and conversions to it. Specialised for SIMD vectors in cpu/sampling.h.
template <class T>
struct Whole {
  using I = int32_t;
  static BKD_HOST_DEVICE T floor(T x) { return std::floor(x); }
  static BKD_HOST_DEVICE I of(T x) { return static_cast<I>(x); }
};

// The four neighbours of a position: top left, top right, bottom left, bottom right.
// pixel: y * width + x, or -1 outside the image, which must not be read: it counts as zero even if the border is Inf or
// NaN. weight: 0 outside the image. by_y, by_x: derivatives of weight. T: a scalar or a SIMD vector.
template <class T>
struct Corners {
  typename Whole<T>::I pixel[4];
  T weight[4], by_y[4], by_x[4];
};

// Without a neighbour inside the image all four weights are zero; a NaN position gives NaN weights.
template <class T>
BKD_HOST_DEVICE Corners<T> corners(T y, T x, int32_t height, int32_t width) {
  using I = typename Whole<T>::I;
  const T zero = {}, one = zero + 1.0f, low = zero - 2.0f;
  const T high_y = zero + static_cast<float>(height + 1), high_x = zero + static_cast<float>(width + 1);
  // Clamp so that the conversion to integers is defined; nothing beyond is inside. NaN passes.
  y = y < low ? low : (y > high_y ? high_y : y);
  x = x < low ? low : (x > high_x ? high_x : x);
  const T top = Whole<T>::floor(y), left = Whole<T>::floor(x);
  const T down = y - top, right = x - left;
  // NaN is not equal to itself: its neighbours are those of position 0.
  const I row = Whole<T>::of(top == top ? top : zero), column = Whole<T>::of(left == left ? left : zero);
  const I none = {}, last_row = none + (height - 1), last_column = none + (width - 1);
  Corners<T> result;
  for (int i = 0; i < 4; ++i) {
    const int below = i >> 1, beside = i & 1;
    const I r = row + below, c = column + beside;
    const I clamped_r = r < none ? none : (r > last_row ? last_row : r);
    const I clamped_c = c < none ? none : (c > last_column ? last_column : c);
    const auto is_inside = (r == clamped_r) & (c == clamped_c);
    const T inside = is_inside ? one : zero;
    const T vertical = below ? down : one - down, horizontal = beside ? right : one - right;
    result.pixel[i] = is_inside ? clamped_r * width + clamped_c : none - 1;
    result.weight[i] = vertical * horizontal * inside;
    result.by_y[i] = (below ? horizontal : -horizontal) * inside;
    result.by_x[i] = (beside ? vertical : -vertical) * inside;
  }
  return result;
}

}  // namespace
}  // namespace bkd
