// Vectors of the width this file is compiled for. GCC's and Clang's vector extensions, so that every tier is the same
// source; without flags a tier uses the 128 bits that x86-64 and ARM64 always have.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "kernel.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define BKD_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define BKD_VECTOR_BYTES 32
#else
#define BKD_VECTOR_BYTES 16
#endif

namespace bkd {
namespace {  // Each tier has its own copy of everything: a function shared by the linker could hold another's instructions.

template <class T>
struct Simd;
template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(BKD_VECTOR_BYTES)));
  typedef float Unaligned __attribute__((vector_size(BKD_VECTOR_BYTES), aligned(4), may_alias));
  typedef int32_t I __attribute__((vector_size(BKD_VECTOR_BYTES)));
};
template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(BKD_VECTOR_BYTES)));
  typedef double Unaligned __attribute__((vector_size(BKD_VECTOR_BYTES), aligned(8), may_alias));
  typedef int64_t I __attribute__((vector_size(BKD_VECTOR_BYTES)));
};
template <class T>
using Vec = typename Simd<T>::V;
template <class T>
constexpr int LANES = BKD_VECTOR_BYTES / sizeof(T);

template <class T>
BKD_INLINE Vec<T> load(const T* from) {
  return *reinterpret_cast<const typename Simd<T>::Unaligned*>(from);
}
template <class T>
BKD_INLINE void store(T* to, Vec<T> value) {
  *reinterpret_cast<typename Simd<T>::Unaligned*>(to) = value;
}
template <class T>
BKD_INLINE Vec<T> all(T value) {
  return value - Vec<T>{};
}
#if defined(__AVX512F__)
template <class T>
BKD_INLINE auto first_lanes(int64_t count) {
  using Mask = std::conditional_t<std::is_same<T, float>::value, __mmask16, __mmask8>;
  return static_cast<Mask>((1u << count) - 1);
}
#elif defined(__AVX2__)
template <class T>
BKD_INLINE __m256i first_lanes(int64_t count) {
  if constexpr (std::is_same<T, float>::value)
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  else
    return _mm256_cmpgt_epi64(_mm256_set1_epi64x(count), _mm256_setr_epi64x(0, 1, 2, 3));
}
#endif
// The first `count` lanes, fewer than there are: the others are not touched in memory, and zero when loaded.
template <class T>
BKD_INLINE Vec<T> load_part(const T* from, int64_t count) {
  constexpr bool single = std::is_same<T, float>::value;
#if defined(__AVX512F__)
  if constexpr (single) return _mm512_maskz_loadu_ps(first_lanes<T>(count), from);
  if constexpr (!single) return _mm512_maskz_loadu_pd(first_lanes<T>(count), from);
#elif defined(__AVX2__)
  if constexpr (single) return _mm256_maskload_ps(from, first_lanes<T>(count));
  if constexpr (!single) return _mm256_maskload_pd(from, first_lanes<T>(count));
#else
  Vec<T> value = {};
  for (int i = 0; i < LANES<T>; ++i)
    if (i < count) value[i] = from[i];
  return value;
#endif
}
template <class T>
BKD_INLINE void store_part(T* to, Vec<T> value, int64_t count) {
  constexpr bool single = std::is_same<T, float>::value;
#if defined(__AVX512F__)
  if constexpr (single) _mm512_mask_storeu_ps(to, first_lanes<T>(count), value);
  if constexpr (!single) _mm512_mask_storeu_pd(to, first_lanes<T>(count), value);
#elif defined(__AVX2__)
  if constexpr (single) _mm256_maskstore_ps(to, first_lanes<T>(count), value);
  if constexpr (!single) _mm256_maskstore_pd(to, first_lanes<T>(count), value);
#else
  for (int i = 0; i < LANES<T>; ++i)
    if (i < count) to[i] = value[i];
#endif
}
template <class T, int... I>
BKD_INLINE Vec<T> fold(Vec<T> value, int half, std::integer_sequence<int, I...>) {
  constexpr int W = LANES<T>;
  if (half == W / 2) return value + __builtin_shufflevector(value, value, ((I + W / 2) % W)...);
  if (half == W / 4) return value + __builtin_shufflevector(value, value, ((I + W / 4) % W)...);
  if (half == W / 8) return value + __builtin_shufflevector(value, value, ((I + W / 8) % W)...);
  return value + __builtin_shufflevector(value, value, ((I + 1) % W)...);
}
template <class T>
BKD_INLINE T lane_sum(Vec<T> value) {
#pragma GCC unroll 4
  for (int half = LANES<T> / 2; half > 0; half /= 2) value = fold<T>(value, half, std::make_integer_sequence<int, LANES<T>>{});
  return value[0];
}
template <class T, int... I>
BKD_INLINE void interleaved_sums(const Vec<T>* value, T* sums, std::integer_sequence<int, I...>) {
  constexpr int W = LANES<T>;
  if constexpr (W < 4) {
    for (int k = 0; k < 4; ++k) sums[k] = lane_sum<T>(value[k]);
    return;
  } else {
    Vec<T> two[2];  // lanes in turn of the vectors 2 i and 2 i + 1
    for (int i = 0; i < 2; ++i)
      two[i] = __builtin_shufflevector(value[2 * i], value[2 * i + 1], (I / 2 * 2 + (I % 2) * W)...) +
               __builtin_shufflevector(value[2 * i], value[2 * i + 1], (I / 2 * 2 + 1 + (I % 2) * W)...);
    Vec<T> four = __builtin_shufflevector(two[0], two[1], (I / 4 * 4 + I % 2 + (I / 2 % 2) * W)...) +
                  __builtin_shufflevector(two[0], two[1], (I / 4 * 4 + 2 + I % 2 + (I / 2 % 2) * W)...);
    if constexpr (W > 8) four += __builtin_shufflevector(four, four, ((I + W / 2) % W)...);
    if constexpr (W > 4) four += __builtin_shufflevector(four, four, ((I + 4) % W)...);
    for (int k = 0; k < 4; ++k) sums[k] = four[k];
  }
}
// The sums of four vectors' lanes, in a third of the steps of four lane_sum().
template <class T>
BKD_INLINE void four_sums(const Vec<T>* value, T* sums) {
  interleaved_sums<T>(value, sums, std::make_integer_sequence<int, LANES<T>>{});
}

// <a, b>
template <class T>
T dot(const T* a, const T* b, int64_t count) {
  constexpr int W = LANES<T>;
  Vec<T> sum[2] = {};
  int64_t i = 0;
  for (; i + 2 * W <= count; i += 2 * W) {
    sum[0] += load(a + i) * load(b + i);
    sum[1] += load(a + i + W) * load(b + i + W);
  }
  for (; i + W <= count; i += W) sum[0] += load(a + i) * load(b + i);
  T total = lane_sum<T>(sum[0] + sum[1]);
  for (; i < count; ++i) total += a[i] * b[i];
  return total;
}

// One bit a lane: whether it is not zero. NaN is not.
template <class T>
BKD_INLINE unsigned nonzero(Vec<T> value) {
  constexpr bool single = std::is_same<T, float>::value;
#if defined(__AVX512F__)
  if constexpr (single) return _mm512_cmp_ps_mask(value, Vec<T>{}, _CMP_NEQ_UQ);
  if constexpr (!single) return _mm512_cmp_pd_mask(value, Vec<T>{}, _CMP_NEQ_UQ);
#elif defined(__AVX2__)
  if constexpr (single) return unsigned(_mm256_movemask_ps(_mm256_cmp_ps(value, Vec<T>{}, _CMP_NEQ_UQ)));
  if constexpr (!single) return unsigned(_mm256_movemask_pd(_mm256_cmp_pd(value, Vec<T>{}, _CMP_NEQ_UQ)));
#else
  unsigned bits = 0;
  for (int i = 0; i < LANES<T>; ++i) bits |= unsigned(value[i] != 0) << i;
  return bits;
#endif
}

template <class V>
BKD_INLINE V larger(V a, V b) {
  return a > b ? a : b;
}

// e^x. Float: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2], relative error below 2e-7, 0 below -87.
BKD_INLINE Vec<float> exponential(Vec<float> x) {
  using V = Vec<float>;
  using I = Simd<float>::I;
  x = x < -87.5f ? all(-87.5f) : x;  // NaN stays
  const V n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // rounds to the nearest whole number
  const V r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  V p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const I power = (__builtin_convertvector(n, I) + 127) << 23;
  V scale;
  std::memcpy(&scale, &power, sizeof scale);
  return x < -87.0f ? V{} : p * scale;
}
BKD_INLINE Vec<double> exponential(Vec<double> x) {
  for (int i = 0; i < LANES<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

template <class T>
BKD_INLINE Vec<T> square_root(Vec<T> x) {
  for (int i = 0; i < LANES<T>; ++i) x[i] = std::sqrt(x[i]);
  return x;
}

// Columns of a square of vectors become rows.
template <class T, int... I>
BKD_INLINE void interleave(Vec<T> a, Vec<T> b, Vec<T>& low, Vec<T>& high, std::integer_sequence<int, I...>) {
  constexpr int W = LANES<T>;
  low = __builtin_shufflevector(a, b, (I / 2 + (I % 2) * W)...);
  high = __builtin_shufflevector(a, b, (W / 2 + I / 2 + (I % 2) * W)...);
}
// The same in blocks of Block elements within lanes of Lane elements: one instruction each on AVX2.
template <class T, int Block, int Lane, int... I>
BKD_INLINE void unpack(Vec<T> a, Vec<T> b, Vec<T>& low, Vec<T>& high, std::integer_sequence<int, I...>) {
  constexpr int W = LANES<T>;
  low = __builtin_shufflevector(a, b, (I / Lane * Lane + I % Lane / (2 * Block) * Block + I % Block + (I / Block % 2) * W)...);
  high = __builtin_shufflevector(
      a, b, (I / Lane * Lane + Lane / 2 + I % Lane / (2 * Block) * Block + I % Block + (I / Block % 2) * W)...);
}

template <class T>
BKD_INLINE void transpose(Vec<T>* rows) {
  constexpr int W = LANES<T>;
  using Index = std::make_integer_sequence<int, W>;
  Vec<T> other[W];
  if constexpr (BKD_VECTOR_BYTES == 32 && W == 8) {
    for (int i = 0; i < 8; i += 2) unpack<T, 1, 4>(rows[i], rows[i + 1], other[i], other[i + 1], Index{});
    for (int i = 0; i < 8; i += 4)
      for (int j = 0; j < 2; ++j) {
        // other[i + j] holds columns 2j, 2j + 1 of rows i, i + 1
        unpack<T, 2, 4>(other[i + j], other[i + j + 2], rows[i + 2 * j], rows[i + 2 * j + 1], Index{});
      }
    for (int i = 0; i < 4; ++i) unpack<T, 4, 8>(rows[i], rows[i + 4], other[i], other[i + 4], Index{});
    for (int i = 0; i < 8; ++i) rows[i] = other[i];
  } else if constexpr (BKD_VECTOR_BYTES == 32) {
    for (int i = 0; i < 4; i += 2) unpack<T, 1, 2>(rows[i], rows[i + 1], other[i], other[i + 1], Index{});
    for (int i = 0; i < 2; ++i) unpack<T, 2, 4>(other[i], other[i + 2], rows[i], rows[i + 2], Index{});
  } else {
    for (int step = 1; step < W; step *= 2) {
      for (int i = 0; i < W / 2; ++i) interleave<T>(rows[i], rows[i + W / 2], other[2 * i], other[2 * i + 1], Index{});
      for (int i = 0; i < W; ++i) rows[i] = other[i];
    }
  }
}

// to[column][row] = from[row][column]; strides in elements between rows of each. The last squares overlap others.
template <class T>
void transpose_block(const T* from, int64_t from_stride, int64_t rows, int64_t columns, T* to, int64_t to_stride) {
  constexpr int W = LANES<T>;
  if (rows < W || columns < W) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < columns; ++c) to[c * to_stride + r] = from[r * from_stride + c];
    return;
  }
  for (int64_t i = 0; i < rows; i += W) {
    const int64_t r = i + W <= rows ? i : rows - W;
    for (int64_t j = 0; j < columns; j += W) {
      const int64_t c = j + W <= columns ? j : columns - W;
      Vec<T> square[W];
      for (int k = 0; k < W; ++k) square[k] = load(from + (r + k) * from_stride + c);
      transpose<T>(square);
      for (int k = 0; k < W; ++k) store(to + (c + k) * to_stride + r, square[k]);
    }
  }
}

}  // namespace
}  // namespace bkd
