// Modulated deformable convolution of bfloat16, forward: as deform_conv.simd.cpp. Samples are float32 until they are
// rounded into pairs of channels, which are neighbours in the depth of the product and transposed as one number of 32
// bits. The weights, whose depth is (channel, tap) in memory, are turned into pairs of channels a few rows at a time,
// in cache.
#include "deform_conv.h"
#include "bfloat.h"
#include "channels.h"
#include "sampling.h"

namespace bkd {
namespace {

// Pairs: so many of ROWS rows of the weights fit the first cache (AMX: the second). 128 pixels of them are 320 KB, and
// the CPUs of this tier cache 1 MB a core.
constexpr int64_t MAX_DEPTH = 640;

struct TileSize {
  int64_t pixels, channels;
};
TileSize tile_size(const BFloatDeformConv& p) {
  int64_t pixels = 128;
  while (pixels > COLUMNS && pixels * p.outputs * int64_t(sizeof(float)) > 512 * 1024) pixels /= 2;
  while (pixels > COLUMNS && p.batch * parts(p.pixels(), pixels) < p.threads) pixels /= 2;
  return {pixels, max(32, 2 * MAX_DEPTH / p.taps() / 32 * 32)};
}

// Where PAIRS pixels sample at one tap, and their weights.
struct BFloatSamples {
  BFloatSamples(const Samples<float>& samples, int64_t tap, int64_t begin, const BFloat* image, int64_t stride) {
    typedef int64_t Addresses __attribute__((vector_size(64)));
    typedef Samples<float>::Index Pixels __attribute__((vector_size(32), aligned(4), may_alias));
    const auto outside = Addresses{} + reinterpret_cast<int64_t>(static_cast<float*>(samples.zeros));
    for (int k = 0; k < 4; ++k) {
      const int64_t at = (tap * 4 + k) * samples.pitch + begin;
      store(weight[k], load(samples.weight + at));
      for (int i = 0; i < PAIRS; i += 8) {
        const auto pixels = *reinterpret_cast<const Pixels*>(samples.pixel + at + i);
        const auto pixel = __builtin_convertvector(pixels, Addresses);
        const Addresses inside = reinterpret_cast<int64_t>(image) + pixel * (stride * int64_t(sizeof(BFloat)));
        const Addresses address = pixel < 0 ? outside : inside;
        std::memcpy(from[k] + i, &address, sizeof address);
      }
    }
  }
  // to[0..channels / 2) = pairs of channels of pixel i. What fills up the last vector is zero.
  BKD_INLINE void read(int i, int64_t channels, Pair* to) const {
    const BFloat* image[4];
    Vec<float> factor[4];
    for (int k = 0; k < 4; ++k) image[k] = reinterpret_cast<const BFloat*>(from[k][i]), factor[k] = all(weight[k][i]);
    const auto sample = [&](int64_t c, const auto& load) {
      Vec<float> first = {}, second = {};
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        const __m512i values = load(image[k] + c);
        first += factor[k] * first_of(values);
        second += factor[k] * second_of(values);
      }
      store_pairs(to + c / 2, pairs_of(first, second));
    };
    int64_t c = 0;
    for (; c + 32 <= channels; c += 32) sample(c, [](const BFloat* at) { return load_pairs(at); });
    if (const int64_t rest = channels - c) sample(c, [rest](const BFloat* at) { return load_pairs(at, rest); });
  }

  int64_t from[4][PAIRS];  // addresses of four neighbours
  float weight[4][PAIRS];
};

// panels[pixel / 32][(c - first) / 2 * taps + tap][pixel % 32] of a run of channels, for a tile of `count` pixels.
void sample_panels(const BFloatDeformConv& p, const BFloat* image, const Samples<float>& samples, int64_t count,
                   Run run, Pair* panels) {
  constexpr int64_t AT_ONCE = 128;  // channels, whose pixels all taps find in the first cache
  const int64_t taps = p.taps(), depth = parts(run.last - run.first, 2) * taps;
  alignas(64) Pair rows[PAIRS][AT_ONCE / 2];
  for (int64_t begin = 0; begin < count; begin += PAIRS) {
    Pair* panel = panels + begin / COLUMNS * COLUMNS * depth + begin % COLUMNS;
    for (int64_t c = run.first; c < run.last; c += AT_ONCE) {
      const int64_t channels = min(run.last - c, AT_ONCE);
      for (int64_t tap = 0; tap < taps; ++tap) {
        const BFloatSamples at(samples, tap, begin, image + c, p.channels);
        for (int i = 0; i < PAIRS; ++i) at.read(i, channels, rows[i]);
        for (int64_t j = 0; j < channels; j += 32) {
          Pair* to = panel + ((c - run.first + j) / 2 * taps + tap) * COLUMNS;
          transpose_pairs(&rows[0][j / 2], AT_ONCE / 2, min(PAIRS, parts(channels - j, 2)), to, taps * COLUMNS);
        }
      }
    }
  }
}

// Turns rows of the weights, (channel, tap), into pairs of channels, (channel / 2, tap). Of 32 channels each vector of
// the result is chosen from 64 numbers, unless there are too many taps.
class WeightPairs {
 public:
  explicit WeightPairs(int64_t taps) : taps_(taps), start_(taps), turns_(32 * taps) {
    for (int64_t v = 0; v < taps; ++v)
      for (int64_t i = 0; i < 32; ++i) {
        const int64_t pair = v * PAIRS + i / 2, at = pair / taps * 2 * taps + pair % taps + i % 2 * taps;
        if (i == 0) start_[v] = at;
        turns_[v * 32 + i] = BFloat(at - start_[v]);
        near_ = near_ && at - start_[v] < 64;
      }
  }
  // Writes whole vectors.
  BKD_INLINE void pack(const BFloat* from, int64_t channels, Pair* to) const {
    if (near_) {
      for (int64_t c = 0; c < channels; c += 32, from += 32 * taps_) {
        const int64_t count = min(32, channels - c), vectors = parts(parts(count, 2) * taps_, PAIRS);
        for (int64_t v = 0; v < vectors; ++v, to += PAIRS) {
          const int64_t left = count * taps_ - start_[v];
          const __m512i one = load_pairs(from + start_[v], left);
          const __m512i two = load_pairs(from + start_[v] + 32, left > 32 ? left - 32 : 0);
          store_pairs(to, _mm512_permutex2var_epi16(one, load_pairs(turns_ + v * 32), two));
        }
      }
      return;
    }
    for (int64_t c = 0; c < channels; c += 2, from += 2 * taps_, to += taps_)
      for (int64_t tap = 0; tap < taps_; tap += PAIRS) {
        const int64_t count = min(PAIRS, taps_ - tap);
        const __m512i second = load_pairs(from + taps_ + tap, c + 1 < channels ? count : 0);
        store_pairs(to + tap, interleaved<0>(load_pairs(from + tap, count), second));
      }
  }

 private:
  const int64_t taps_;
  bool near_ = true;
  Scratch<int64_t> start_;
  Scratch<BFloat> turns_;
};

void write_tile(const BFloatDeformConv& p, const float* sums, int64_t pitch, int64_t begin, int64_t count,
                BFloat* image) {
  if (p.output_pixel_stride == 1) {
    for (int64_t o = 0; o < p.outputs; ++o) {
      BFloat* to = image + o * p.output_channel_stride + begin;
      const Vec<float> bias = all(p.bias ? p.bias[o] : 0.0f);
      for (int64_t i = 0; i < count; i += PAIRS) store_rounded(to + i, load(sums + o * pitch + i) + bias, count - i);
    }
    return;
  }
  for (int64_t o = 0; o < p.outputs; o += PAIRS) {
    const int64_t outputs = min(PAIRS, p.outputs - o);
    const Vec<float> bias = p.bias ? load_part(p.bias + o, outputs) : Vec<float>{};
    for (int64_t i = 0; i < count; i += PAIRS) {
      Vec<float> square[PAIRS] = {};
      for (int64_t r = 0; r < outputs; ++r) square[r] = load(sums + (o + r) * pitch + i);
      transpose<float>(square);
      for (int64_t k = 0; k < min(PAIRS, count - i); ++k)
        store_rounded(image + (begin + i + k) * p.outputs + o, square[k] + bias, outputs);
    }
  }
}

void deform_conv_bfloat(const BFloatDeformConv& p) {
  const int64_t taps = p.taps(), pixels = p.pixels();
  const TileSize tile = tile_size(p);
  const int64_t width = tile.pixels, tiles = parts(pixels, width);
  const int64_t part = p.channels / p.groups, share = p.channels / p.offset_groups, per_group = p.outputs / p.groups;
  const int64_t row = part * taps;  // of the weights
  Scratch<Run> runs(p.channels);
  const int64_t run_count = split_channels(p, tile.channels, runs);
  const int64_t max_depth = parts(min(tile.channels, p.channels), 2) * taps;
  const int64_t pitch = row_pitch(max_depth + PAIRS);  // with what is written beyond their ends
  in_parallel(p.parallel, p.batch * tiles, [&](TaskQueue& queue) {
    Samples<float> samples(taps, width, p.channels);
    const WeightPairs pairs(taps);
    const Multiplier multiplier;
    Scratch<Pair> panels(width * max_depth), rows(ROWS * pitch);
    Scratch<float> sums(p.outputs * width);
    for (int64_t task; (task = queue.next()) >= 0;) {
      const int64_t n = task / tiles, begin = task % tiles * width, count = min(width, pixels - begin);
      const int64_t used = parts(count, COLUMNS);
      int64_t planned = -1;
      for (int64_t r = 0; r < run_count; ++r) {
        const Run run = runs[r];
        const int64_t group = run.first / part, channels = run.last - run.first, depth = parts(channels, 2) * taps;
        if (run.first / share != planned) {
          planned = run.first / share;
          samples.plan(p, n, planned * taps, (planned + 1) * taps, begin, count);
        }
        sample_panels(p, p.bfloat_image(n), samples, count, run, panels);
        const BFloat* weight = p.bfloat_weight + group * per_group * row + (run.first - group * part) * taps;
        float* to = sums + group * per_group * width;
        for (int64_t o = 0; o < per_group; o += ROWS) {
          const int64_t outputs = min(ROWS, per_group - o);
          for (int64_t i = 0; i < outputs; ++i) pairs.pack(weight + (o + i) * row, channels, rows + i * pitch);
          const Fetch next(weight + (o + ROWS) * row, min(ROWS, per_group - o - ROWS), channels * taps * sizeof(BFloat),
                           row * sizeof(BFloat), depth * used);
          multiply_pairs(outputs, depth, {rows, pitch, 1}, {panels, depth * COLUMNS, used},
                         {to + o * width, width, COLUMNS, run.first > group * part}, next);
        }
      }
      write_tile(p, sums, width, begin, count, p.bfloat_output + n * p.outputs * pixels);
    }
  });
}

}  // namespace

BKD_DEFINE_BFLOAT_KERNEL(deform_conv_bfloat, BFloatDeformConv)

}  // namespace bkd
