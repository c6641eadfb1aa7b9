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

// Positions of `taps` kernel taps (of kernel size kernel[0] x kernel[1], again and again) at an output pixel.
template <class T, class Problem>
BKD_INLINE Corners<T> corners_of(const Problem& p, const T* offset, int64_t tap, int64_t pixel) {
  const int64_t within = tap % (p.kernel[0] * p.kernel[1]);
  const int64_t row = pixel / p.out_width, column = pixel % p.out_width;
  const T* move = offset + 2 * tap * p.pixels() + pixel;
  const T y = move[0] + T(row * p.stride[0] - p.padding[0] + within / p.kernel[1] * p.dilation[0]);
  const T x = move[p.pixels()] + T(column * p.stride[1] - p.padding[1] + within % p.kernel[1] * p.dilation[1]);
  return corners(y, x, static_cast<int32_t>(p.height), static_cast<int32_t>(p.width));
}

// samples[tap - first][i] for pixels begin + i. offset and mask of one image.
template <class T, class Problem>
void plan(const Problem& p, const T* offset, const T* mask, int64_t first, int64_t last, int64_t begin, int64_t count,
          Sample<T>* samples) {
  for (int64_t tap = first; tap < last; ++tap)
    for (int64_t i = 0; i < count; ++i) {
      const Corners<T> at = corners_of(p, offset, tap, begin + i);
      const T modulation = mask ? mask[tap * p.pixels() + begin + i] : T(1);
      Sample<T>& sample = *samples++;
      for (int k = 0; k < 4; ++k) {
        sample.pixel[k] = at.pixel[k];
        sample.weight[k] = at.weight[k] * modulation;
      }
    }
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
