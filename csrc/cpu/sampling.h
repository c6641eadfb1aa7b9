// Where a tile of output pixels samples, and the samples: what both deformable operators share.
#pragma once

#include "../common/bilinear.h"
#include "simd.h"
#include "work.h"

namespace bkd {
namespace {

template <class T>
struct WholeLanes {
  using I = typename Simd<T>::I;
  static BKD_INLINE Vec<T> floor(Vec<T> x) {  // within the integers' range; NaN stays
    const Vec<T> cut = __builtin_convertvector(of(x == x ? x : Vec<T>{}), Vec<T>);
    const Vec<T> down = cut > x ? cut - T(1) : cut;
    return x == x ? down : x;
  }
  static BKD_INLINE I of(Vec<T> x) { return __builtin_convertvector(x, I); }
};
template <>
struct Whole<Vec<float>> : WholeLanes<float> {};
template <>
struct Whole<Vec<double>> : WholeLanes<double> {};

// Row and column of every pixel of a tile, as numbers that offsets are added to.
template <class T, class Problem>
void base_positions(const Problem& p, int64_t begin, int64_t count, T* rows, T* columns) {
  int64_t row = begin / p.out_width, column = begin % p.out_width;
  for (int64_t i = 0; i < rounded(count, LANES<T>); ++i) {
    rows[i] = T(row * p.stride[0] - p.padding[0]);
    columns[i] = T(column * p.stride[1] - p.padding[1]);
    if (++column == p.out_width) column = 0, ++row;
  }
}

// A tile's pixels begin.. of image n, seen from one slot. A problem's slots are its kernel's taps, again and again: for
// every offset group, or every group of taps.
template <class T, class Problem>
struct View {
  const Problem& p;
  int64_t n, slot, begin, count;
  const T *rows, *columns;  // of base_positions()

  int64_t left(int64_t i) const { return count - i; }
  Vec<T> read(const T* from, int64_t i) const {
    return left(i) < LANES<T> ? load_part(from + i, left(i)) : load(from + i);
  }
  Corners<Vec<T>> corners_at(int64_t i) const {
    const int64_t tap = slot % (p.kernel[0] * p.kernel[1]);
    const T* offset = p.offset + 2 * (n * p.slots() + slot) * p.pixels() + begin;
    const Vec<T> y = read(offset, i) + load(rows + i) + T(tap / p.kernel[1] * p.dilation[0]);
    const Vec<T> x = read(offset + p.pixels(), i) + load(columns + i) + T(tap % p.kernel[1] * p.dilation[1]);
    return corners(y, x, static_cast<int32_t>(p.height), static_cast<int32_t>(p.width));
  }
  Vec<T> modulation_at(int64_t i) const {  // one without a mask
    return p.mask ? read(p.mask + (n * p.slots() + slot) * p.pixels() + begin, i) : all(T(1));
  }
};

// Samples of a tile: for slot after slot, four pixels of the input and four weights into which the mask is folded.
// pixel, weight: [slot][corner][pitch]; pixel is -1 outside the image.
template <class T>
struct Samples {
  using Index = typename std::remove_reference<decltype(typename Simd<T>::I{}[0])>::type;

  // channels: that are read at a time at most.
  Samples(int64_t slots, int64_t width, int64_t channels)
      : pitch(rounded(width, LANES<T>)),
        pixel(4 * slots * pitch),
        weight(4 * slots * pitch),
        rows(pitch),
        columns(pitch),
        zeros(channels),
        ignored(channels) {
    std::memset(zeros, 0, channels * sizeof(T));
    std::memset(ignored, 0, channels * sizeof(T));
  }

  // Of slots first.. to last.
  template <class Problem>
  void plan(const Problem& p, int64_t n, int64_t first, int64_t last, int64_t begin, int64_t count) {
    base_positions(p, begin, count, static_cast<T*>(rows), static_cast<T*>(columns));
    for (int64_t slot = first; slot < last; ++slot) {
      const View<T, Problem> view = {p, n, slot, begin, count, rows, columns};
      for (int64_t i = 0; i < count; i += LANES<T>) {
        const Corners<Vec<T>> at = view.corners_at(i);
        const Vec<T> modulation = view.modulation_at(i);
        for (int k = 0; k < 4; ++k) {
          std::memcpy(pixel + ((slot - first) * 4 + k) * pitch + i, &at.pixel[k], sizeof at.pixel[k]);
          store(weight + ((slot - first) * 4 + k) * pitch + i, at.weight[k] * modulation);
        }
      }
    }
  }

  const int64_t pitch;
  Scratch<Index> pixel;
  Scratch<T> weight, rows, columns;
  Scratch<T> zeros, ignored;  // what is read outside the image, and where gradients go that belong there
};

// One sample: its four pixels in an image whose pixels are `stride` elements apart, and their weights. What lies
// outside is read as zeros.
template <class T>
struct Sample {
  BKD_INLINE Sample(const Samples<T>& samples, int64_t slot, int64_t i, const T* image, int64_t stride) {
    for (int k = 0; k < 4; ++k) {
      const int64_t pixel = samples.pixel[(slot * 4 + k) * samples.pitch + i];
      offset[k] = pixel < 0 ? -1 : pixel * stride;
      from[k] = pixel < 0 ? samples.zeros : image + offset[k];
      weight[k] = samples.weight[(slot * 4 + k) * samples.pitch + i];
    }
  }
  // to[0..channels) = the sample.
  BKD_INLINE void read(int64_t channels, T* to) const {
    constexpr int W = LANES<T>;
    const Vec<T> factor[4] = {all(weight[0]), all(weight[1]), all(weight[2]), all(weight[3])};
    int64_t c = 0;
    for (; c + W <= channels; c += W)
      store(to + c, factor[0] * load(from[0] + c) + factor[1] * load(from[1] + c) + factor[2] * load(from[2] + c) +
                        factor[3] * load(from[3] + c));
    if (const int64_t rest = channels - c)
      store_part(to + c,
                 factor[0] * load_part(from[0] + c, rest) + factor[1] * load_part(from[1] + c, rest) +
                     factor[2] * load_part(from[2] + c, rest) + factor[3] * load_part(from[3] + c, rest),
                 rest);
  }

  const T* from[4];
  int64_t offset[4];  // from the image; -1 outside
  T weight[4];
};

// Derivatives of a tile's samples by their y, x and mask: dots[k * pitch + i] is the product of the gradient by sample
// i with corner k. Results where not null.
template <class T, class Problem>
void sampling_gradients(const View<T, Problem>& view, const T* dots, int64_t pitch, T* by_y, T* by_x, T* by_mask) {
  const auto write = [&](T* to, int64_t i, Vec<T> value) {
    if (!to) return;
    if (view.left(i) < LANES<T>)
      store_part(to + i, value, view.left(i));
    else
      store(to + i, value);
  };
  for (int64_t i = 0; i < view.count; i += LANES<T>) {
    const Corners<Vec<T>> at = view.corners_at(i);
    const Vec<T> modulation = view.modulation_at(i);
    Vec<T> y = {}, x = {}, mask = {};
    for (int k = 0; k < 4; ++k) {
      const Vec<T> dot = load(dots + k * pitch + i);
      y += dot * at.by_y[k];
      x += dot * at.by_x[k];
      mask += dot * at.weight[k];
    }
    write(by_y, i, y * modulation);
    write(by_x, i, x * modulation);
    write(by_mask, i, mask);
  }
}

// Pixels of a tile of the sampling operator: fewer where threads would idle.
template <class Problem>
int64_t gather_width(const Problem& p) {
  int64_t width = 256;
  while (width > 16 && p.batch * parts(p.pixels(), width) < 4 * p.threads) width /= 2;
  return width;
}

}  // namespace
}  // namespace bkd
