// Modulated deformable convolution, forward: sampling writes the packed operand of the matrix product.
//
// A task is a tile of output pixels. For one block of channels after another it samples all taps into panels that fit
// the second cache, and multiplies them by the weights, which are read as they lie in memory: a row of the weights is
// contiguous in (channel, tap), and the panels are filled in that order. No column buffer and no packing of the weights.
#include "deform_conv.h"

#include "channels.h"
#include "gemm.h"
#include "sampling.h"

namespace bkd {
namespace {

// Sampled values of one block at a time: second-cache size, less room for the sums.
template <class T>
constexpr int64_t PANEL_ELEMENTS = 192 * 1024 / sizeof(T);

// Pixels of a tile, and channels that are sampled for it at a time. The channels set the order of sums: the number of threads
// has no part in them.
struct TileSize {
  int64_t pixels, channels;
};
template <class T>
TileSize tile_size(const DeformConv<T>& p) {
  // The weights are read once for each tile: wide tiles, unless their sums outgrow the cache or threads would idle.
  int64_t pixels = 128;
  while (pixels > NR<T> && pixels * p.outputs * int64_t(sizeof(T)) > 512 * 1024) pixels /= 2;
  const int64_t channels = PANEL_ELEMENTS<T> / (pixels * p.taps()) / LANES<T> * LANES<T>;
  while (pixels > NR<T> && p.batch * parts(p.pixels(), pixels) < p.threads) pixels /= 2;
  return {rounded(pixels, NR<T>), most(LANES<T>, channels)};
}

// panels[pixel / NR][(c - first) * taps + tap][pixel % NR] of a run of channels, for a tile of `count` pixels; samples:
// of the run's offset group.
template <class T>
void sample_panels(const DeformConv<T>& p, const T* image, const Samples<T>& samples, int64_t count, Run run, T* panels) {
  constexpr int W = LANES<T>;
  constexpr int64_t AT_ONCE = 64;  // channels of one pixel that are sampled before they are turned round
  const int64_t taps = p.taps(), depth = (run.last - run.first) * taps;
  T rows[W * AT_ONCE];
  for (int64_t begin = 0; begin < count; begin += W) {
    T* panel = panels + begin / NR<T> * NR<T> * depth + begin % NR<T>;
    for (int64_t tap = 0; tap < taps; ++tap)
      for (int64_t c = run.first; c < run.last; c += AT_ONCE) {
        const int64_t channels = least(run.last - c, AT_ONCE);
        for (int i = 0; i < W; ++i)  // what fills up the last vector is not read again
          Sample<T>(samples, tap, begin + i < count ? begin + i : begin, image + c, p.channels)
              .read(channels, rows + i * AT_ONCE);
        transpose_block<T>(rows, AT_ONCE, W, channels, panel + ((c - run.first) * taps + tap) * NR<T>, taps * NR<T>);
      }
  }
}

template <class T>
void write_tile(const DeformConv<T>& p, const T* sums, int64_t pitch, int64_t begin, int64_t count, T* image) {
  if (p.output_pixel_stride == 1) {
    for (int64_t o = 0; o < p.outputs; ++o) {
      T* to = image + o * p.output_channel_stride + begin;
      const T bias = p.bias ? p.bias[o] : T(0);
      for (int64_t i = 0; i < count; ++i) to[i] = sums[o * pitch + i] + bias;
    }
    return;
  }
  T* to = image + begin * p.output_pixel_stride;
  transpose_block<T>(sums, pitch, p.outputs, count, to, p.output_pixel_stride);
  if (p.bias)
    for (int64_t i = 0; i < count; ++i)
      for (int64_t o = 0; o < p.outputs; ++o) to[i * p.output_pixel_stride + o] += p.bias[o];
}

template <class T>
void deform_conv(const DeformConv<T>& p) {
  const int64_t taps = p.taps(), pixels = p.pixels();
  const TileSize tile = tile_size(p);
  const int64_t width = tile.pixels, tiles = parts(pixels, width);
  const int64_t part = p.channels / p.groups, share = p.channels / p.offset_groups, per_group = p.outputs / p.groups;
  Scratch<Run> runs(p.channels);
  const int64_t run_count = split_channels(p, tile.channels, runs);
  in_parallel(p.parallel, p.batch * tiles, [&](TaskQueue& queue) {
    Samples<T> samples(taps, width, p.channels);
    Scratch<T> panels(width * least(tile.channels, p.channels) * taps), sums(p.outputs * width);
    for (int64_t task; (task = queue.next()) >= 0;) {
      const int64_t n = task / tiles, begin = task % tiles * width, count = least(width, pixels - begin);
      int64_t planned = -1;
      for (int64_t r = 0; r < run_count; ++r) {
        const Run run = runs[r];
        const int64_t group = run.first / part, depth = (run.last - run.first) * taps;
        if (run.first / share != planned) {
          planned = run.first / share;
          samples.plan(p, n, planned * taps, (planned + 1) * taps, begin, count);
        }
        sample_panels<T>(p, p.image(n), samples, count, run, panels);
        const T* weight = p.weight + group * per_group * part * taps + (run.first - group * part) * taps;
        gemm<T>(per_group, depth, {weight, part * taps, 1}, {panels, depth * NR<T>, NR<T>}, parts(count, NR<T>),
                sums + group * per_group * width, width, run.first > group * part);
      }
      write_tile<T>(p, sums, width, begin, count, p.output + n * p.outputs * pixels);
    }
  });
}

}  // namespace

BKD_DEFINE_KERNEL(deform_conv, DeformConv)

}  // namespace bkd
