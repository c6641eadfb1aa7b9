// Matrix products of a tile that is in cache: both factors as they lie in memory, B with NR columns side by side.
#pragma once

#include "simd.h"
#include "work.h"

namespace bkd {
namespace {

// A panel is NR columns of B.
template <class T>
constexpr int NR = 2 * LANES<T>;
// Rows of A at a time: MR x 2 sums, and what they are made of, fill the vector registers.
constexpr int MR = BKD_VECTOR_BYTES == 64 ? 12 : 6;

// Element (row, k) at row * row_stride + k * depth_stride.
template <class T>
struct Left {
  const T* at;
  int64_t row_stride, depth_stride;
};
// Element (k, column) at column / NR * panel_stride + k * depth_stride + column % NR.
template <class T>
struct Right {
  const T* at;
  int64_t panel_stride, depth_stride;
};

template <class T, int Rows>
BKD_INLINE void gemm_tile(int64_t depth, Left<T> a, const T* b, int64_t b_stride, T* c, int64_t c_stride, bool add) {
  constexpr int W = LANES<T>;
  Vec<T> sum[Rows][2] = {};
  for (int64_t k = 0; k < depth; ++k) {
    const Vec<T> left = load(b), right = load(b + W);
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r) {
      const Vec<T> x = all(a.at[r * a.row_stride]);
      sum[r][0] += x * left;
      sum[r][1] += x * right;
    }
    a.at += a.depth_stride;
    b += b_stride;
  }
#pragma GCC unroll 12
  for (int r = 0; r < Rows; ++r) {
    T* row = c + r * c_stride;
    store(row, add ? load(row) + sum[r][0] : sum[r][0]);
    store(row + W, add ? load(row + W) + sum[r][1] : sum[r][1]);
  }
}

template <class T, int Rows>
void gemm_tail(int64_t rows, int64_t depth, Left<T> a, Right<T> b, int64_t panels, T* c, int64_t c_stride, bool add) {
  if constexpr (Rows > 0) {
    if (rows < Rows) return gemm_tail<T, Rows - 1>(rows, depth, a, b, panels, c, c_stride, add);
    for (int64_t p = 0; p < panels; ++p)
      gemm_tile<T, Rows>(depth, a, b.at + p * b.panel_stride, b.depth_stride, c + p * NR<T>, c_stride, add);
  }
}

// Rows that come next, on their way to the second cache: one of `shares` shares of them.
template <class T>
BKD_INLINE void fetch_rows(Left<T> a, int64_t rows, int64_t depth, int64_t share, int64_t shares) {
  constexpr int64_t LINE = 64 / sizeof(T);
  if (a.depth_stride != 1) return;
  for (int64_t r = rows * share / shares; r < rows * (share + 1) / shares; ++r)
    for (int64_t k = 0; k < depth; k += LINE) __builtin_prefetch(a.at + r * a.row_stride + k, 0, 2);
}

// Rows that lie whole pages apart push each other out of the first cache: worth a copy where many panels read them.
template <class T>
BKD_INLINE bool collide(Left<T> a, int64_t panels) {
  return a.depth_stride == 1 && a.row_stride * int64_t(sizeof(T)) % 4096 == 0 && panels >= 8;
}
template <class T>
BKD_INLINE Left<T> copied(Left<T> a, int64_t depth, T* to) {
  const int64_t pitch = depth + 64 / sizeof(T);
  for (int64_t r = 0; r < MR; ++r) std::memcpy(to + r * pitch, a.at + r * a.row_stride, depth * sizeof(T));
  return {to, pitch, 1};
}

// C (+)= A B. A: rows x depth; B: depth x (panels NR); C: rows x (panels NR), c_stride between rows; `add` to what is
// there or replace it.
template <class T>
void gemm(int64_t rows, int64_t depth, Left<T> a, Right<T> b, int64_t panels, T* c, int64_t c_stride, bool add) {
  constexpr int64_t MAX_DEPTH = 512;
  alignas(64) T buffer[MR * (MAX_DEPTH + 64 / sizeof(T))];
  const bool copy = depth <= MAX_DEPTH && collide(a, panels);
  int64_t r = 0;
  // A's rows stay in the first cache while the panels pass.
  for (; r + MR <= rows; r += MR) {
    const Left<T> from = {a.at + r * a.row_stride, a.row_stride, a.depth_stride};
    const Left<T> next = {from.at + MR * a.row_stride, a.row_stride, a.depth_stride};
    const Left<T> now = copy ? copied(from, depth, buffer) : from;
    for (int64_t p = 0; p < panels; ++p) {
      fetch_rows(next, min(MR, rows - r - MR), depth, p, panels);
      gemm_tile<T, MR>(depth, now, b.at + p * b.panel_stride, b.depth_stride, c + r * c_stride + p * NR<T>, c_stride,
                       add);
    }
  }
  a.at += r * a.row_stride;
  gemm_tail<T, MR - 1>(rows - r, depth, a, b, panels, c + r * c_stride, c_stride, add);
}

}  // namespace
}  // namespace bkd
