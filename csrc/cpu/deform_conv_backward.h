// Modulated deformable convolution, backward. Nothing is kept from the forward pass; sums have one order whatever the
// number of threads, because every sum that is spread over tasks belongs to one of them or is added up afterwards.
#pragma once

#include "deform_conv.h"

namespace bkd {
namespace {

// panels[pixel / NR][output][pixel % NR] of the gradient by a tile of the outputs of one group.
template <class T>
void grad_panels(const DeformConv<T>& p, const T* grad, int64_t begin, int64_t count, int64_t outputs, T* panels) {
  for (int64_t i = 0; i < count; i += NR<T>) {
    T* panel = panels + i * outputs;
    const int64_t wide = least(NR<T>, count - i);
    if (p.output_pixel_stride == 1) {
      for (int64_t o = 0; o < outputs; ++o)
        for (int64_t j = 0; j < wide; ++j) panel[o * NR<T> + j] = grad[o * p.output_channel_stride + begin + i + j];
    } else {
      transpose_block<T>(grad + (begin + i) * p.output_pixel_stride, p.output_pixel_stride, wide, outputs, panel, NR<T>);
    }
  }
}

// Takes the gradient by the samples of one pixel and tap, `grad`, to the image's gradient and to the four corners:
// result[k] = <grad, pixel k>.
template <class T>
BKD_INLINE void sample_channels_backward(const Corners<T>& at, T modulation, const T* grad, const T* image,
                                         T* grad_image, int64_t stride, int64_t channels, T* result) {
  constexpr int W = LANES<T>;
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    const T* from = image + at.pixel[k] * stride;
    const T weight = at.weight[k] * modulation;
    Vec<T> dot = {};
    T rest = 0;
    int64_t c = 0;
    if (grad_image) {
      T* to = grad_image + at.pixel[k] * stride;
      for (; c + W <= channels; c += W) {
        const Vec<T> g = load(grad + c);
        dot += g * load(from + c);
        store(to + c, load(to + c) + g * weight);
      }
      for (; c < channels; ++c) {
        rest += grad[c] * from[c];
        to[c] += grad[c] * weight;
      }
    } else {
      for (; c + W <= channels; c += W) dot += load(grad + c) * load(from + c);
      for (; c < channels; ++c) rest += grad[c] * from[c];
    }
    result[k] = lane_sum<T>(dot) + rest;
  }
}

// One image, one run of channels: grad_input of these channels, and their part of the moves, [tap][pixel].
template <class T>
void run_backward(const DeformConv<T>& p, int64_t n, Run run, const T* turned, int64_t width, Move<T>* moves) {
  constexpr int W = LANES<T>;
  const int64_t taps = p.taps(), pixels = p.pixels(), per_group = p.outputs / p.groups, part = p.channels / p.groups;
  const int64_t channels = run.last - run.first, rows = channels * taps;
  const int64_t group = run.first / part, offset_group = run.first / (p.channels / p.offset_groups);
  const T* image = p.image(n) + run.first;
  T* grad_image = p.grad_input ? p.grad_input + (image - p.input) : nullptr;
  const T* grad = p.grad + n * p.outputs * pixels + group * per_group * p.output_channel_stride;
  Scratch<T> panels(per_group * width), columns(rows * width), turned_back(W * channels);
  for (int64_t begin = 0; begin < pixels; begin += width) {
    const int64_t count = least(width, pixels - begin);
    grad_panels<T>(p, grad, begin, count, per_group, panels);
    // columns[(channel, tap)][pixel]: the gradient by the samples
    gemm<T>(rows, per_group, turned + run.first * taps * per_group, per_group, panels, per_group * NR<T>,
            parts(count, NR<T>), columns, width, false);
    for (int64_t tap = 0; tap < taps; ++tap)
      for (int64_t i = 0; i < count; i += W) {
        transpose_block<T>(columns + tap * width + i, taps * width, channels, W, turned_back, channels);
        for (int64_t j = i; j < least(i + W, count); ++j) {
          const int64_t slot = offset_group * taps + tap;
          const Corners<T> at = corners_of<T>(p, n, slot, begin + j);
          const T modulation = modulation_of<T>(p, n, slot, begin + j);
          T dot[4];
          sample_channels_backward<T>(at, modulation, turned_back + (j - i) * channels, image, grad_image, p.channels,
                                      channels, dot);
          moves[tap * pixels + begin + j] = move_of(at, modulation, dot);
        }
      }
  }
}

// grad_input, grad_offset and grad_mask. grad_input comes filled with zeros.
template <class T>
void data_backward(const DeformConv<T>& p) {
  constexpr int64_t CHANNELS = 32;  // of a task; a run's part of the moves is kept until all runs are there
  const int64_t taps = p.taps(), pixels = p.pixels(), part = p.channels / p.groups, per_group = p.outputs / p.groups;
  const int64_t slots = p.slots(), share = p.channels / p.offset_groups;
  const int64_t width = rounded(per_group > 1024 ? 32 : 64, NR<T>);
  Scratch<Run> runs(p.channels);
  const int64_t run_count = split_channels(p, CHANNELS, runs);
  // The weights with inputs as rows: [group][(channel, tap)][output].
  Scratch<T> turned(p.outputs * part * taps);
  const int64_t strips = parts(part * taps, 64);
  in_parallel(p.parallel, p.groups * strips, [&](Queue& queue) {
    for (int64_t task; (task = queue.next()) >= 0;) {
      const int64_t group = task / strips, k = task % strips * 64;
      transpose_block<T>(p.weight + group * per_group * part * taps + k, part * taps, per_group, least(64, part * taps - k),
                      turned + (group * part * taps + k) * per_group, per_group);
    }
  });
  const int64_t together = least(p.batch, parts(4 * p.threads, run_count));  // images
  Scratch<Move<T>> moves(together * run_count * taps * pixels);
  for (int64_t first = 0; first < p.batch; first += together) {
    const int64_t images = least(together, p.batch - first);
    in_parallel(p.parallel, images * run_count, [&](Queue& queue) {
      for (int64_t task; (task = queue.next()) >= 0;)
        run_backward<T>(p, first + task / run_count, runs[task % run_count], turned, width,
                        moves + task * taps * pixels);
    });
    in_parallel(p.parallel, images * slots, [&](Queue& queue) {
      for (int64_t task; (task = queue.next()) >= 0;) {
        const int64_t n = task / slots, slot = task % slots, group = slot / taps;
        int64_t begin = 0;
        while (runs[begin].first / share < group) ++begin;
        for (int64_t i = 0; i < pixels; ++i) {
          Move<T> sum = {0, 0, 0};
          for (int64_t r = begin; r < run_count && runs[r].first / share == group; ++r) {
            const Move<T>& move = moves[((n * run_count + r) * taps + slot % taps) * pixels + i];
            sum.y += move.y;
            sum.x += move.x;
            sum.mask += move.mask;
          }
          const int64_t at = (first + n) * slots + slot;
          if (p.grad_offset) {
            p.grad_offset[2 * at * pixels + i] = sum.y;
            p.grad_offset[(2 * at + 1) * pixels + i] = sum.x;
          }
          if (p.grad_mask) p.grad_mask[at * pixels + i] = sum.mask;
        }
      }
    });
  }
}

// grad_weight: a task owns one tap of one run of channels, for all outputs, and goes through all pixels.
template <class T>
void weight_backward(const DeformConv<T>& p) {
  constexpr int64_t CHANNELS = 4 * NR<T>, PIXELS = 128;
  const int64_t taps = p.taps(), pixels = p.pixels(), part = p.channels / p.groups, share = p.channels / p.offset_groups;
  const int64_t per_group = p.outputs / p.groups;
  Scratch<Run> runs(p.channels);
  const int64_t run_count = split_channels(p, CHANNELS, runs);
  in_parallel(p.parallel, run_count * taps, [&](Queue& queue) {
    Scratch<Sample<T>> samples(PIXELS);
    Scratch<T> panels(PIXELS * CHANNELS), sums(per_group * CHANNELS), turned(per_group * PIXELS);
    for (int64_t task; (task = queue.next()) >= 0;) {
      const Run run = runs[task / taps];
      const int64_t tap = task % taps, channels = run.last - run.first, group = run.first / part;
      const int64_t slot = run.first / share * taps + tap;
      bool started = false;
      for (int64_t n = 0; n < p.batch; ++n) {
        const T* image = p.image(n) + run.first;
        const T* grad = p.grad + n * p.outputs * pixels + group * per_group * p.output_channel_stride;
        for (int64_t begin = 0; begin < pixels; begin += PIXELS) {
          const int64_t count = least(PIXELS, pixels - begin);
          plan<T>(p, n, slot, slot + 1, begin, count, samples);
          for (int64_t c = 0; c < channels; c += NR<T>)  // panels[channel / NR][pixel][channel % NR]
            for (int64_t i = 0; i < count; ++i)
              sample_channels(samples[i], image + c, p.channels, least(NR<T>, channels - c),
                              panels + c * PIXELS + i * NR<T>);
          const T* rows = grad + begin;
          int64_t rows_stride = p.output_channel_stride;
          if (p.output_pixel_stride != 1) {
            transpose_block<T>(grad + begin * p.output_pixel_stride, p.output_pixel_stride, count, per_group, turned, PIXELS);
            rows = turned, rows_stride = PIXELS;
          }
          gemm<T>(per_group, count, rows, rows_stride, panels, PIXELS * NR<T>, parts(channels, NR<T>), sums, CHANNELS,
                  started);
          started = true;
        }
      }
      for (int64_t o = 0; o < per_group; ++o)
        for (int64_t c = 0; c < channels; ++c)
          p.grad_weight[((group * per_group + o) * part + run.first - group * part + c) * taps + tap] =
              started ? sums[o * CHANNELS + c] : T(0);
    }
  });
}

template <class T>
void deform_conv_backward(const DeformConv<T>& p) {
  if (p.grad_input || p.grad_offset || p.grad_mask) data_backward(p);
  if (p.grad_weight) weight_backward(p);
}

}  // namespace
}  // namespace bkd
