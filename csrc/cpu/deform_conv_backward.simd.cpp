// Modulated deformable convolution, backward. Nothing is kept from the forward pass; sums have one order whatever the
// number of threads, because every sum that is spread over tasks belongs to one of them or is added up afterwards.
#include "deform_conv.h"

#include "channels.h"
#include "gemm.h"
#include "sampling.h"

namespace bkd {
namespace {

// Channels of a task: wide, since a position is worked out once for all of them, but at least two tasks an image.
template <class T>
int64_t backward_channels(const DeformConv<T>& p) {
  return least(64, rounded(most(16, parts(p.channels, 2)), LANES<T>));
}

// The weights of a run of channels as the right factor of the product with the gradient:
// packed[column / NR][output][column % NR], column = tap * channels + channel; zero in what fills up the last panel.
template <class T>
void pack_weights(const DeformConv<T>& p, Run run, T* packed) {
  const int64_t taps = p.taps(), part = p.channels / p.groups, per_group = p.outputs / p.groups;
  const int64_t channels = run.last - run.first, columns = channels * taps, group = run.first / part;
  const T* weight = p.weight + group * per_group * part * taps + (run.first - group * part) * taps;
  Scratch<int64_t> places(columns);
  for (int64_t column = 0; column < columns; ++column) places[column] = column % channels * taps + column / channels;
  for (int64_t o = 0; o < per_group; ++o) {
    const T* from = weight + o * part * taps;
    for (int64_t column = 0; column < columns; column += NR<T>) {
      T* to = packed + column * per_group + o * NR<T>;
      const int64_t used = least(NR<T>, columns - column);
      for (int64_t i = 0; i < used; ++i) to[i] = from[places[column + i]];
      for (int64_t i = used; i < NR<T>; ++i) to[i] = 0;
    }
  }
}

// Takes the gradient by one sample to the image's gradient, and to the corners: dots[k * pitch] = <grad, corner k>.
template <class T>
BKD_INLINE void sample_backward(const Sample<T>& sample, const T* grad, T* grad_image, T* ignored, int64_t channels,
                                T* dots, int64_t pitch) {
  constexpr int W = LANES<T>;
  T* targets[4];
  for (int k = 0; k < 4; ++k) targets[k] = grad_image && sample.offset[k] >= 0 ? grad_image + sample.offset[k] : ignored;
  Vec<T> sums[4] = {};
  T totals[4];
  int64_t c = 0;
  for (; c + W <= channels; c += W) {
    const Vec<T> g = load(grad + c);
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      sums[k] += g * load(sample.from[k] + c);
      if (grad_image) {
        T* to = targets[k] + c;
        store(to, load(to) + g * sample.weight[k]);
      }
    }
  }
  if (const int64_t rest = channels - c) {
    const Vec<T> g = load_part(grad + c, rest);
    for (int k = 0; k < 4; ++k) {
      sums[k] += g * load_part(sample.from[k] + c, rest);
      if (grad_image) {
        T* to = targets[k] + c;
        store_part(to, load_part(to, rest) + g * sample.weight[k], rest);
      }
    }
  }
  four_sums<T>(sums, totals);
  for (int k = 0; k < 4; ++k) dots[k * pitch] = totals[k];
}

// One image, one run of channels: grad_input of these channels, and their part of the moves, [tap][y, x, mask][pixel].
template <class T>
void run_backward(const DeformConv<T>& p, int64_t n, Run run, T* found) {
  constexpr int64_t WIDTH = 96, DEPTH = 256;  // pixels and outputs of a product: its factors fit the second cache
  const int64_t taps = p.taps(), pixels = p.pixels(), per_group = p.outputs / p.groups, part = p.channels / p.groups;
  const int64_t channels = run.last - run.first, pitch = rounded(channels * taps, NR<T>);
  const int64_t group = run.first / part, slot = run.first / (p.channels / p.offset_groups) * taps;
  const T* image = p.image(n) + run.first;
  T* grad_image = p.grad_input ? p.grad_input + (image - p.input) : nullptr;
  const T* grad = p.grad + n * p.outputs * pixels + group * per_group * p.output_channel_stride;
  Scratch<T> packed(per_group * pitch), columns(WIDTH * pitch), dots(4 * WIDTH);
  Samples<T> samples(taps, WIDTH, p.channels);
  pack_weights<T>(p, run, packed);
  for (int64_t begin = 0; begin < pixels; begin += WIDTH) {
    const int64_t count = least(WIDTH, pixels - begin);
    samples.plan(p, n, slot, slot + taps, begin, count);
    // columns[pixel][(tap, channel)]: the gradient by the samples
    for (int64_t o = 0; o < per_group; o += DEPTH)
      gemm<T>(count, least(DEPTH, per_group - o),
              {grad + begin * p.output_pixel_stride + o * p.output_channel_stride, p.output_pixel_stride, p.output_channel_stride},
              {packed + o * NR<T>, per_group * NR<T>, NR<T>}, pitch / NR<T>, columns, pitch, o > 0);
    for (int64_t tap = 0; tap < taps; ++tap) {
      for (int64_t i = 0; i < count; ++i)
        sample_backward<T>({samples, tap, i, image, p.channels}, columns + i * pitch + tap * channels, grad_image,
                           samples.ignored, channels, dots + i, WIDTH);
      T* to = found + 3 * tap * pixels + begin;
      moves<T>(View<T, DeformConv<T>>{p, n, slot + tap, begin, count, samples.rows, samples.columns}, dots, WIDTH, to, to + pixels,
               to + 2 * pixels);
    }
  }
}

// grad_input, grad_offset and grad_mask. grad_input comes filled with zeros.
template <class T>
void data_backward(const DeformConv<T>& p) {
  const int64_t taps = p.taps(), pixels = p.pixels(), slots = p.slots(), share = p.channels / p.offset_groups;
  Scratch<Run> runs(p.channels);
  const int64_t run_count = split_channels(p, backward_channels(p), runs);
  const int64_t together = least(p.batch, parts(4 * p.threads, run_count));  // images
  Scratch<T> found(together * run_count * taps * 3 * pixels);
  for (int64_t first = 0; first < p.batch; first += together) {
    const int64_t images = least(together, p.batch - first);
    in_parallel(p.parallel, images * run_count, [&](TaskQueue& queue) {
      for (int64_t task; (task = queue.next()) >= 0;)
        run_backward<T>(p, first + task / run_count, runs[task % run_count], found + task * taps * 3 * pixels);
    });
    // What the runs of an offset group found, added up in their order.
    in_parallel(p.parallel, images * slots, [&](TaskQueue& queue) {
      for (int64_t task; (task = queue.next()) >= 0;) {
        const int64_t n = task / slots, slot = task % slots, at = (first + n) * slots + slot;
        T* by_y = p.grad_offset ? p.grad_offset + 2 * at * pixels : nullptr;
        T* results[3] = {by_y, by_y ? by_y + pixels : nullptr, p.grad_mask ? p.grad_mask + at * pixels : nullptr};
        for (int k = 0; k < 3; ++k) {
          bool started = false;
          for (int64_t r = 0; r < run_count && results[k]; ++r) {
            if (runs[r].first / share != slot / taps) continue;
            const T* from = found + (((n * run_count + r) * taps + slot % taps) * 3 + k) * pixels;
            for (int64_t i = 0; i < pixels; ++i) results[k][i] = started ? results[k][i] + from[i] : from[i];
            started = true;
          }
        }
      }
    });
  }
}

// grad_weight of one run of channels, from tiles first.. of all images' tiles: sums[output][tap * channels + channel].
template <class T>
void weight_sums(const DeformConv<T>& p, Run run, int64_t width, int64_t first, int64_t last, Samples<T>& samples, T* sampled,
                 T* sums) {
  const int64_t taps = p.taps(), pixels = p.pixels(), tiles = parts(pixels, width), part = p.channels / p.groups;
  const int64_t per_group = p.outputs / p.groups, channels = run.last - run.first, group = run.first / part;
  const int64_t slot = run.first / (p.channels / p.offset_groups) * taps, pitch = rounded(channels * taps, NR<T>);
  for (int64_t tile = first; tile < last; ++tile) {
    const int64_t n = tile / tiles, begin = tile % tiles * width, count = least(width, pixels - begin);
    samples.plan(p, n, slot, slot + taps, begin, count);
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t tap = 0; tap < taps; ++tap)
        Sample<T>(samples, tap, i, p.image(n) + run.first, p.channels).read(channels, sampled + i * pitch + tap * channels);
      for (int64_t c = taps * channels; c < pitch; ++c) sampled[i * pitch + c] = 0;
    }
    const T* grad = p.grad + n * p.outputs * pixels + group * per_group * p.output_channel_stride;
    gemm<T>(per_group, count, {grad + begin * p.output_pixel_stride, p.output_channel_stride, p.output_pixel_stride},
            {sampled, NR<T>, pitch}, pitch / NR<T>, sums, pitch, tile > first);
  }
}

// A task owns a run of channels; where there are few runs, a part of the pixels too, and the parts are added up.
template <class T>
void weight_backward(const DeformConv<T>& p) {
  constexpr int64_t WIDTH = 128;
  const int64_t taps = p.taps(), part = p.channels / p.groups, per_group = p.outputs / p.groups;
  const int64_t size = p.outputs * part * taps, tiles = p.batch * parts(p.pixels(), WIDTH);
  if (!tiles) return static_cast<void>(std::memset(p.grad_weight, 0, size * sizeof(T)));
  Scratch<Run> runs(p.channels);
  const int64_t length = least(backward_channels(p), 32), run_count = split_channels(p, length, runs);
  const int64_t pieces = least(tiles, parts(16, run_count)), each = parts(tiles, pieces), used = parts(tiles, each);
  Scratch<T> others((used - 1) * size);  // what all pieces but the first found
  in_parallel(p.parallel, run_count * used, [&](TaskQueue& queue) {
    const int64_t widest = rounded(least(length, p.channels) * taps, NR<T>);
    Samples<T> samples(taps, WIDTH, p.channels);
    Scratch<T> sampled(WIDTH * widest), sums(per_group * widest);
    for (int64_t task; (task = queue.next()) >= 0;) {
      const int64_t piece = task % used, first = piece * each;
      const Run run = runs[task / used];
      const int64_t channels = run.last - run.first, group = run.first / part, pitch = rounded(channels * taps, NR<T>);
      weight_sums<T>(p, run, WIDTH, first, least(tiles, first + each), samples, sampled, sums);
      T* result = (piece ? others + (piece - 1) * size : p.grad_weight) + (run.first - group * part) * taps;
      for (int64_t o = 0; o < per_group; ++o)
        for (int64_t c = 0; c < channels; ++c)
          for (int64_t tap = 0; tap < taps; ++tap)
            result[((group * per_group + o) * part + c) * taps + tap] = sums[o * pitch + tap * channels + c];
    }
  });
  for (int64_t piece = 1; piece < used; ++piece)
    for (int64_t i = 0; i < size; ++i) p.grad_weight[i] += others[(piece - 1) * size + i];
}

template <class T>
void deform_conv_backward(const DeformConv<T>& p) {
  if (p.grad_input || p.grad_offset || p.grad_mask) data_backward(p);
  if (p.grad_weight) weight_backward(p);
}

}  // namespace

BKD_DEFINE_KERNEL(deform_conv_backward, DeformConv)

}  // namespace bkd
