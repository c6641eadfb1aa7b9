// Products of bfloat16 numbers, two at a time, on the instruction sets that have them (vdpbf16ps; AMX: tiles.h). Two
// numbers that are neighbours in the depth of a product share 32 bits, a pair. Sums are float32.
#pragma once

#include "gemm.h"

#if !defined(__AVX512BF16__)
#error "a file of bfloat16 products needs -mavx512bf16"
#endif

namespace bkd {
namespace {

using Pair = int32_t;
constexpr int64_t PAIRS = 16;           // of a vector
constexpr int64_t COLUMNS = NR<float>;  // of a panel: 32
// How far apart rows of whole vectors are that do not share sets of a cache: an odd number of its lines.
BKD_INLINE int64_t row_pitch(int64_t pairs) { return (parts(pairs, PAIRS) | 1) * PAIRS; }

BKD_INLINE __m512i load_pairs(const void* from) { return _mm512_loadu_si512(from); }
BKD_INLINE void store_pairs(Pair* to, __m512i value) { _mm512_storeu_si512(to, value); }
// The first `count` of 32 numbers; the others are zero, and not touched in memory.
BKD_INLINE __m512i load_pairs(const BFloat* from, int64_t count) {
  return _mm512_maskz_loadu_epi16(count < 32 ? (1u << count) - 1 : ~0u, from);
}
// The first `count` of 32 numbers.
BKD_INLINE void store_pairs(BFloat* to, __m512i value, int64_t count) {
  _mm512_mask_storeu_epi16(to, count < 32 ? (1u << count) - 1 : ~0u, value);
}
// Pairs of the numbers of two rows, of the columns First.. to First + 16.
template <int First>
BKD_INLINE __m512i interleaved(__m512i first, __m512i second) {
  alignas(64) uint16_t index[32];
  for (int i = 0; i < 32; ++i) index[i] = uint16_t(First + i / 2 + i % 2 * 32);
  return _mm512_permutex2var_epi16(first, load_pairs(index), second);
}
BKD_INLINE void store_interleaved(__m512i first, __m512i second, Pair* to) {
  store_pairs(to, interleaved<0>(first, second));
  store_pairs(to + PAIRS, interleaved<PAIRS>(first, second));
}
// The first and the second numbers of pairs, as floats.
BKD_INLINE Vec<float> first_of(__m512i pairs) { return (Vec<float>)((Simd<float>::I)pairs << 16); }
BKD_INLINE Vec<float> second_of(__m512i pairs) { return (Vec<float>)((Simd<float>::I)pairs & int32_t(0xffff0000)); }
// Pairs of floats, rounded.
BKD_INLINE __m512i pairs_of(Vec<float> first, Vec<float> second) {
  const __m512i turns = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_maskz_permutexvar_epi16(~0u, turns, (__m512i)_mm512_cvtne2ps_pbh(second, first));
}
// sum + the products of both numbers of each pair.
BKD_INLINE Vec<float> add_products(Vec<float> sum, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

// 32 floats, rounded.
BKD_INLINE __m512i rounded_panel(const float* from) {
  return (__m512i)_mm512_cvtne2ps_pbh(load(from + PAIRS), load(from));
}
// to[0..count) = floats, rounded.
BKD_INLINE void store_rounded(BFloat* to, Vec<float> value, int64_t count) {
  const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(value);
  _mm256_mask_storeu_epi16(to, count < 16 ? __mmask16((1u << count) - 1) : __mmask16(~0u), rounded);
}

// to[column][row] of PAIRS rows and up to as many columns; strides between rows of each.
BKD_INLINE void transpose_pairs(const Pair* from, int64_t from_stride, int64_t columns, Pair* to, int64_t to_stride) {
  Vec<float> square[PAIRS];
  for (int i = 0; i < PAIRS; ++i) square[i] = (Vec<float>)load_pairs(from + i * from_stride);
  transpose<float>(square);
  if (columns == PAIRS) {
    for (int k = 0; k < PAIRS; ++k) store_pairs(to + k * to_stride, (__m512i)square[k]);
    return;
  }
  for (int k = 0; k < columns; ++k) store_pairs(to + k * to_stride, (__m512i)square[k]);
}

// Rows that come next, on their way to the first cache while a product is computed: a line every few steps of its
// depth, since more at a time would wait for each other.
class Fetch {
 public:
  BKD_INLINE Fetch() : Fetch(nullptr, 0, 0, 0, 0) {}
  // rows x bytes, `stride` bytes apart, in `steps` steps.
  BKD_INLINE Fetch(const void* from, int64_t rows, int64_t bytes, int64_t stride, int64_t steps)
      : row_(static_cast<const char*>(from)), rows_(rows), bytes_(bytes), stride_(stride) {
    const int64_t lines = rows * (bytes / LINE + 1);
    every = lines > 0 ? max(1, steps / lines) : MAX_STEPS;
  }
  BKD_INLINE void next() {
    if (rows_ <= 0) return;
    __builtin_prefetch(row_ + at_);
    if ((at_ += LINE) < bytes_ + LINE) return;
    at_ = 0, row_ += stride_, --rows_;
  }
  int64_t every;  // steps between two lines

 private:
  static constexpr int64_t LINE = 64, MAX_STEPS = int64_t(1) << 40;
  const char* row_;
  int64_t rows_, bytes_, stride_, at_ = 0;
};

// Dense panels of B, `stride` pairs apart.
struct PairPanels {
  const Pair* at;
  int64_t stride, count;
};
// Where a product is written to, in panels of NR columns, or added.
struct Products {
  float* at;
  int64_t row_stride, panel_stride;
  bool add;
};

}  // namespace
}  // namespace bkd

#if defined(__AMX_BF16__)
#include "tiles.h"
#else
namespace bkd {
namespace {

constexpr int64_t ROWS = MR;          // of A at a time
constexpr int64_t TIMES_AS_FAST = 2;  // as products of floats
// What a thread needs while it multiplies.
struct Multiplier {
  BKD_INLINE Multiplier() {}
};

// As gemm_tile(), of pairs.
template <int Rows>
BKD_INLINE void pair_tile(int64_t depth, Left<Pair> a, const Pair* b, Products c, Fetch& fetch) {
  Vec<float> sum[Rows][2] = {};
  for (int64_t k = 0; k < depth;) {
    fetch.next();
    for (const int64_t end = min(depth, k + fetch.every); k < end; ++k) {
      const __m512i left = load_pairs(b), right = load_pairs(b + PAIRS);
#pragma GCC unroll 12
      for (int r = 0; r < Rows; ++r) {
        const __m512i x = _mm512_set1_epi32(a.at[r * a.row_stride]);
        sum[r][0] = add_products(sum[r][0], x, left);
        sum[r][1] = add_products(sum[r][1], x, right);
      }
      a.at += a.depth_stride;
      b += COLUMNS;
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < Rows; ++r) {
    float* row = c.at + r * c.row_stride;
    store(row, c.add ? load(row) + sum[r][0] : sum[r][0]);
    store(row + PAIRS, c.add ? load(row + PAIRS) + sum[r][1] : sum[r][1]);
  }
}

// C (+)= A B, of up to ROWS rows of A and `depth` pairs.
template <int Rows = ROWS>
void multiply_pairs(int64_t rows, int64_t depth, Left<Pair> a, PairPanels b, Products c, Fetch fetch = {}) {
  if constexpr (Rows > 0) {
    if (rows < Rows) return multiply_pairs<Rows - 1>(rows, depth, a, b, c, fetch);
    for (int64_t p = 0; p < b.count; ++p, b.at += b.stride, c.at += c.panel_stride)
      pair_tile<Rows>(depth, a, b.at, c, fetch);
  }
}

}  // namespace
}  // namespace bkd
#endif
