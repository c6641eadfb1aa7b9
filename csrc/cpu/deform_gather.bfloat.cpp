// Sampling of bfloat16, as deform_gather.simd.cpp: sums are float32 and get the bits that they have there.
#include "deform_gather.h"
#include "bfloat.h"
#include "sampling.h"

namespace bkd {
namespace {

// to[0..left) = sum of `taps` samples of pixel i, for Blocks x 32 channels at most; channels of tap t at image + t *
// channels.
template <int Blocks>
BKD_INLINE void gather_blocks(const Samples<float>& samples, int64_t i, int64_t taps, const BFloat* image,
                              int64_t channels, int64_t left, BFloat* to) {
  const auto* zeros = reinterpret_cast<const BFloat*>(static_cast<float*>(samples.zeros));
  Vec<float> first[Blocks] = {}, second[Blocks] = {};
  for (int64_t tap = 0; tap < taps; ++tap)
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const int64_t at = (tap * 4 + k) * samples.pitch + i, pixel = samples.pixel[at];
      const BFloat* from = pixel < 0 ? zeros : image + (pixel * taps + tap) * channels;
      const Vec<float> weight = all(samples.weight[at]);
#pragma GCC unroll 4
      for (int b = 0; b < Blocks; ++b) {
        const __m512i pairs = Blocks == 1 ? load_pairs(from, left) : load_pairs(from + 32 * b);
        first[b] += weight * first_of(pairs);
        second[b] += weight * second_of(pairs);
      }
    }
  for (int b = 0; b < Blocks; ++b) store_pairs(to + 32 * b, pairs_of(first[b], second[b]), left - 32 * b);
}

void deform_gather_bfloat(const BFloatDeformGather& p) {
  constexpr int64_t BLOCK = 4 * 32;
  const int64_t pixels = p.pixels(), taps = p.taps, width = gather_width(p), tiles = parts(pixels, width);
  in_parallel(p.parallel, p.batch * tiles, [&](TaskQueue& queue) {
    Samples<float> samples(taps, width, p.channels);
    for (int64_t task; (task = queue.next()) >= 0;) {
      const int64_t n = task / tiles, begin = task % tiles * width, count = min(width, pixels - begin);
      const BFloat* image = p.bfloat_image(n);
      samples.plan(p, n, 0, taps, begin, count);
      BFloat* output = p.bfloat_output + (n * pixels + begin) * p.channels;
      // One block of channels of the whole tile at a time: what neighbouring pixels share is then still in cache.
      for (int64_t c = 0; c < p.channels;) {
        const int64_t left = p.channels - c;
        for (int64_t i = 0; i < count; ++i) {
          BFloat* to = output + i * p.channels + c;
          if (left >= BLOCK)
            gather_blocks<4>(samples, i, taps, image + c, p.channels, left, to);
          else
            gather_blocks<1>(samples, i, taps, image + c, p.channels, left, to);
        }
        c += left >= BLOCK ? BLOCK : 32;
      }
    }
  });
}

}  // namespace

BKD_DEFINE_BFLOAT_KERNEL(deform_gather_bfloat, BFloatDeformGather)

}  // namespace bkd
