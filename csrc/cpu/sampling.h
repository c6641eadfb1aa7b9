// Where a tile of output pixels samples, and the samples: what both deformable operators share.
#pragma once

#include "../common/bilinear.h"
#include "simd.h"
#include "work.h"

namespace bkd {
namespace {

// One tap of one output pixel: four pixels of the input, and weights into which the mask is folded.
template <class T>
struct Sample {
  int32_t pixel[4];
  T weight[4];
};

// Where slot `slot` of an output pixel of image n samples. A problem's slots are its kernel's taps, again and again:
// for every offset group, or every group of taps.
template <class T, class Problem>
BKD_INLINE Corners<T> corners_of(const Problem& p, int64_t n, int64_t slot, int64_t pixel) {
  const int64_t tap = slot % (p.kernel[0] * p.kernel[1]);
  const int64_t row = pixel / p.out_width, column = pixel % p.out_width;
  const T* move = p.offset + 2 * (n * p.slots() + slot) * p.pixels() + pixel;
  const T y = move[0] + T(row * p.stride[0] - p.padding[0] + tap / p.kernel[1] * p.dilation[0]);
  const T x = move[p.pixels()] + T(column * p.stride[1] - p.padding[1] + tap % p.kernel[1] * p.dilation[1]);
  return corners(y, x, static_cast<int32_t>(p.height), static_cast<int32_t>(p.width));
}

// The mask there; one without a mask.
template <class T, class Problem>
BKD_INLINE T modulation_of(const Problem& p, int64_t n, int64_t slot, int64_t pixel) {
  return p.mask ? p.mask[(n * p.slots() + slot) * p.pixels() + pixel] : T(1);
}

// samples[slot - first][i] for pixels begin + i of image n.
template <class T, class Problem>
void plan(const Problem& p, int64_t n, int64_t first, int64_t last, int64_t begin, int64_t count, Sample<T>* samples) {
  for (int64_t slot = first; slot < last; ++slot)
    for (int64_t i = 0; i < count; ++i) {
      const Corners<T> at = corners_of<T>(p, n, slot, begin + i);
      const T modulation = modulation_of<T>(p, n, slot, begin + i);
      Sample<T>& sample = *samples++;
      for (int k = 0; k < 4; ++k) {
        sample.pixel[k] = at.pixel[k];
        sample.weight[k] = at.weight[k] * modulation;
      }
    }
}

// Derivatives of one sample by its y, x and mask.
template <class T>
struct Move {
  T y, x, mask;
};

// dot[k]: product of the gradient by the sample with corner k.
template <class T>
BKD_INLINE Move<T> move_of(const Corners<T>& at, T modulation, const T* dot) {
  Move<T> move = {0, 0, 0};
  for (int k = 0; k < 4; ++k) {
    move.y += dot[k] * at.by_y[k];
    move.x += dot[k] * at.by_x[k];
    move.mask += dot[k] * at.weight[k];
  }
  move.y *= modulation;
  move.x *= modulation;
  return move;
}

// to[0..channels) = the sample of an image whose pixels are `stride` elements apart.
template <class T>
BKD_INLINE void sample_channels(const Sample<T>& sample, const T* image, int64_t stride, int64_t channels, T* to) {
  constexpr int W = LANES<T>;
  const T* from[4];
  for (int k = 0; k < 4; ++k) from[k] = image + sample.pixel[k] * stride;
  const Vec<T> weight[4] = {all(sample.weight[0]), all(sample.weight[1]), all(sample.weight[2]), all(sample.weight[3])};
  int64_t c = 0;
  for (; c + W <= channels; c += W)
    store(to + c, weight[0] * load(from[0] + c) + weight[1] * load(from[1] + c) + weight[2] * load(from[2] + c) +
                      weight[3] * load(from[3] + c));
  for (; c < channels; ++c)
    to[c] = sample.weight[0] * from[0][c] + sample.weight[1] * from[1][c] + sample.weight[2] * from[2][c] +
            sample.weight[3] * from[3][c];
}

}  // namespace
}  // namespace bkd
