// Sampling of an input that holds its products with the weights: reads, sums, and no matrix product.
#include "deform_gather.h"

#include "sampling.h"

namespace bkd {
namespace {

constexpr int GATHER_VECTORS = 8;  // of channels whose sums stay in registers

// to[0..Vectors LANES) = sum of `taps` samples of pixel i, or of the first `lanes` channels (0 = all); channels of tap
// t at image + t * channels.
template <class T, int Vectors>
BKD_INLINE void gather_channels(const Samples<T>& samples, int64_t i, int64_t taps, const T* image, int64_t channels,
                                int64_t lanes, T* to) {
  constexpr int W = LANES<T>;
  Vec<T> sum[Vectors] = {};
  for (int64_t tap = 0; tap < taps; ++tap) {
    const Sample<T> sample(samples, tap, i, image + tap * channels, taps * channels);
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const Vec<T> weight = all(sample.weight[k]);
      if (Vectors == 1 && lanes) {
        sum[0] += weight * load_part(sample.from[k], lanes);
        continue;
      }
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) sum[v] += weight * load(sample.from[k] + v * W);
    }
  }
  if (Vectors == 1 && lanes) return store_part(to, sum[0], lanes);
  for (int v = 0; v < Vectors; ++v) store(to + v * W, sum[v]);
}

template <class T>
void deform_gather(const DeformGather<T>& p) {
  constexpr int64_t BLOCK = GATHER_VECTORS * LANES<T>;
  const int64_t pixels = p.pixels(), taps = p.taps, width = gather_width(p), tiles = parts(pixels, width);
  in_parallel(p.parallel, p.batch * tiles, [&](TaskQueue& queue) {
    Samples<T> samples(taps, width, p.channels);
    for (int64_t task; (task = queue.next()) >= 0;) {
      const int64_t n = task / tiles, begin = task % tiles * width, count = min(width, pixels - begin);
      const T* image = p.image(n);
      samples.plan(p, n, 0, taps, begin, count);
      T* output = p.output + (n * pixels + begin) * p.channels;
      // One block of channels of the whole tile at a time: what neighbouring pixels share is then still in cache.
      int64_t c = 0;
      for (; c + BLOCK <= p.channels; c += BLOCK)
        for (int64_t i = 0; i < count; ++i)
          gather_channels<T, GATHER_VECTORS>(samples, i, taps, image + c, p.channels, 0, output + i * p.channels + c);
      for (; c < p.channels; c += LANES<T>) {
        const int64_t lanes = c + LANES<T> <= p.channels ? 0 : p.channels - c;
        for (int64_t i = 0; i < count; ++i)
          gather_channels<T, 1>(samples, i, taps, image + c, p.channels, lanes, output + i * p.channels + c);
      }
    }
  });
}

// grad_offset and grad_mask: every position has its own.
template <class T>
void offset_mask_backward(const DeformGather<T>& p) {
  const int64_t pixels = p.pixels(), taps = p.taps, width = 64, tiles = parts(pixels, width);
  in_parallel(p.parallel, p.batch * tiles, [&](TaskQueue& queue) {
    Samples<T> samples(taps, width, p.channels);
    Scratch<T> dots(4 * samples.pitch);
    for (int64_t task; (task = queue.next()) >= 0;) {
      const int64_t n = task / tiles, begin = task % tiles * width, count = min(width, pixels - begin);
      samples.plan(p, n, 0, taps, begin, count);
      for (int64_t tap = 0; tap < taps; ++tap) {
        for (int64_t i = 0; i < count; ++i) {
          const Sample<T> sample(samples, tap, i, p.image(n) + tap * p.channels, taps * p.channels);
          const T* grad = p.grad + (n * pixels + begin + i) * p.channels;
          for (int k = 0; k < 4; ++k) dots[k * samples.pitch + i] = dot(grad, sample.from[k], p.channels);
        }
        const int64_t slot = n * taps + tap;
        T* by_y = p.grad_offset ? p.grad_offset + 2 * slot * pixels + begin : nullptr;
        sampling_gradients<T>(View<T, DeformGather<T>>{p, n, tap, begin, count, samples.rows, samples.columns}, dots,
                              samples.pitch, by_y, by_y ? by_y + pixels : nullptr,
                              p.grad_mask ? p.grad_mask + slot * pixels + begin : nullptr);
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
  in_parallel(p.parallel, inputs * taps * blocks, [&](TaskQueue& queue) {
    Samples<T> samples(1, PIXELS, BLOCK);
    for (int64_t task; (task = queue.next()) >= 0;) {
      const int64_t input = task / (taps * blocks), tap = task / blocks % taps, first = task % blocks * BLOCK;
      const int64_t channels = min(BLOCK, p.channels - first);
      T* image = p.grad_projected + input * p.height * p.width * pixel_stride + tap * p.channels + first;
      for (int64_t n = p.shared ? 0 : input; n < (p.shared ? p.batch : input + 1); ++n)
        for (int64_t begin = 0; begin < pixels; begin += PIXELS) {
          const int64_t count = min(PIXELS, pixels - begin);
          samples.plan(p, n, tap, tap + 1, begin, count);
          for (int64_t i = 0; i < count; ++i) {
            const T* grad = p.grad + (n * pixels + begin + i) * p.channels + first;
            for (int k = 0; k < 4; ++k) {
              const int64_t pixel = samples.pixel[k * samples.pitch + i];
              if (pixel < 0) continue;
              T* to = image + pixel * pixel_stride;
              const T weight = samples.weight[k * samples.pitch + i];
              int64_t c = 0;
              for (; c + W <= channels; c += W) store(to + c, load(to + c) + load(grad + c) * weight);
              if (const int64_t rest = channels - c)
                store_part(to + c, load_part(to + c, rest) + load_part(grad + c, rest) * weight, rest);
            }
          }
        }
    }
  });
}

template <class T>
void deform_gather_backward(const DeformGather<T>& p) {
  if (p.grad_offset || p.grad_mask) offset_mask_backward(p);
  if (p.grad_projected) projected_backward(p);
}

}  // namespace

BKD_DEFINE_KERNEL(deform_gather, DeformGather)
BKD_DEFINE_KERNEL(deform_gather_backward, DeformGather)

}  // namespace bkd
