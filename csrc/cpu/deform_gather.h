// Sampling of an input that holds its products with the weights: reads, sums, and no matrix product.
#pragma once

#include "sampling.h"

namespace bkd {
namespace {

constexpr int GATHER_VECTORS = 8;  // of channels whose sums stay in registers
constexpr int64_t GATHER_PIXELS = 256;

// to[0..Vectors LANES) = sum of `taps` samples; samples[tap * pitch], channels of tap t at image + t * channels.
template <class T, int Vectors>
BKD_INLINE void gather_channels(const Sample<T>* samples, int64_t pitch, int64_t taps, const T* image, int64_t channels,
                                T* to) {
  constexpr int W = LANES<T>;
  Vec<T> sum[Vectors] = {};
  for (int64_t tap = 0; tap < taps; ++tap) {
    const Sample<T>& sample = samples[tap * pitch];
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const T* from = image + sample.pixel[k] * taps * channels + tap * channels;
      const Vec<T> weight = all(sample.weight[k]);
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) sum[v] += weight * load(from + v * W);
    }
  }
  for (int v = 0; v < Vectors; ++v) store(to + v * W, sum[v]);
}

template <class T>
void deform_gather(const DeformGather<T>& p) {
  constexpr int64_t BLOCK = GATHER_VECTORS * LANES<T>;
  const int64_t pixels = p.pixels(), taps = p.taps;
  int64_t width = GATHER_PIXELS;
  while (width > 16 && p.batch * parts(pixels, width) < 4 * p.threads) width /= 2;
  const int64_t tiles = parts(pixels, width);
  in_parallel(p.parallel, p.batch * tiles, [&](Queue& queue) {
    Scratch<Sample<T>> samples(taps * width);
    for (int64_t task; (task = queue.next()) >= 0;) {
      const int64_t n = task / tiles, begin = task % tiles * width, count = least(width, pixels - begin);
      const T* image = p.image(n);
      plan<T>(p, n, 0, taps, begin, count, samples);
      T* output = p.output + (n * pixels + begin) * p.channels;
      // One block of channels of the whole tile at a time: what neighbouring pixels share is then still in cache.
      int64_t c = 0;
      for (; c + BLOCK <= p.channels; c += BLOCK)
        for (int64_t i = 0; i < count; ++i)
          gather_channels<T, GATHER_VECTORS>(samples + i, count, taps, image + c, p.channels, output + i * p.channels + c);
      for (; c + LANES<T> <= p.channels; c += LANES<T>)
        for (int64_t i = 0; i < count; ++i)
          gather_channels<T, 1>(samples + i, count, taps, image + c, p.channels, output + i * p.channels + c);
      for (; c < p.channels; ++c)
        for (int64_t i = 0; i < count; ++i) {
          T sum = 0;
          for (int64_t tap = 0; tap < taps; ++tap)
            for (int k = 0; k < 4; ++k) {
              const Sample<T>& sample = samples[tap * count + i];
              sum += sample.weight[k] * image[(sample.pixel[k] * taps + tap) * p.channels + c];
            }
          output[i * p.channels + c] = sum;
        }
    }
  });
}

// grad_offset and grad_mask: every position has its own.
template <class T>
void moves_backward(const DeformGather<T>& p) {
  const int64_t pixels = p.pixels(), taps = p.taps, pixel_stride = taps * p.channels;
  const int64_t width = 64, tiles = parts(pixels, width);
  in_parallel(p.parallel, p.batch * tiles, [&](Queue& queue) {
    for (int64_t task; (task = queue.next()) >= 0;) {
      const int64_t n = task / tiles, begin = task % tiles * width, end = least(begin + width, pixels);
      const T* image = p.image(n);
      for (int64_t tap = 0; tap < taps; ++tap)
        for (int64_t i = begin; i < end; ++i) {
          const Corners<T> at = corners_of<T>(p, n, tap, i);
          const T modulation = modulation_of<T>(p, n, tap, i);
          const int64_t slot = (n * taps + tap) * pixels + i;
          const T* grad = p.grad + (n * pixels + i) * p.channels;
          T along[4];
          for (int k = 0; k < 4; ++k)
            along[k] = dot(grad, image + at.pixel[k] * pixel_stride + tap * p.channels, p.channels);
          const Move<T> move = move_of(at, modulation, along);
          if (p.grad_offset) {
            p.grad_offset[slot * 2 - i] = move.y;
            p.grad_offset[slot * 2 - i + pixels] = move.x;
          }
          if (p.grad_mask) p.grad_mask[slot] = move.mask;
        }
    }
  });
}

// grad_projected, which comes filled with zeros: a task owns a tap and a block of channels of one input.
template <class T>
void projected_backward(const DeformGather<T>& p) {
  constexpr int W = LANES<T>;
  constexpr int64_t BLOCK = 64, PIXELS = 128;
  const int64_t pixels = p.pixels(), taps = p.taps, pixel_stride = taps * p.channels;
  const int64_t blocks = parts(p.channels, BLOCK), inputs = p.shared ? 1 : p.batch;
  in_parallel(p.parallel, inputs * taps * blocks, [&](Queue& queue) {
    Scratch<Sample<T>> samples(PIXELS);
    for (int64_t task; (task = queue.next()) >= 0;) {
      const int64_t input = task / (taps * blocks), tap = task / blocks % taps, first = task % blocks * BLOCK;
      const int64_t channels = least(BLOCK, p.channels - first);
      T* image = p.grad_projected + input * p.height * p.width * pixel_stride + tap * p.channels + first;
      for (int64_t n = p.shared ? 0 : input; n < (p.shared ? p.batch : input + 1); ++n)
        for (int64_t begin = 0; begin < pixels; begin += PIXELS) {
          const int64_t count = least(PIXELS, pixels - begin);
          plan<T>(p, n, tap, tap + 1, begin, count, samples);
          for (int64_t i = 0; i < count; ++i) {
            const T* grad = p.grad + (n * pixels + begin + i) * p.channels + first;
            for (int k = 0; k < 4; ++k) {
              T* to = image + samples[i].pixel[k] * pixel_stride;
              const T weight = samples[i].weight[k];
              int64_t c = 0;
              for (; c + W <= channels; c += W) store(to + c, load(to + c) + load(grad + c) * weight);
              for (; c < channels; ++c) to[c] += grad[c] * weight;
            }
          }
        }
    }
  });
}

template <class T>
void deform_gather_backward(const DeformGather<T>& p) {
  if (p.grad_offset || p.grad_mask) moves_backward(p);
  if (p.grad_projected) projected_backward(p);
}

}  // namespace
}  // namespace bkd
