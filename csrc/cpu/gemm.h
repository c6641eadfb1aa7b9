// Matrix products of a tile that is in cache: rows of A as they lie in memory, B packed in panels.
#pragma once

#include "simd.h"

namespace bkd {
namespace {

// A panel is NR columns of B, row after row: panel[k][0..NR).
template <class T>
constexpr int NR = 2 * LANES<T>;
// Rows of A at a time: MR x 2 sums, and what they are made of, fill the vector registers.
constexpr int MR = BKD_VECTOR_BYTES == 64 ? 12 : 6;

template <class T, int Rows>
BKD_INLINE void gemm_tile(int64_t depth, const T* a, int64_t a_stride, const T* panel, T* c, int64_t c_stride, bool add) {
  constexpr int W = LANES<T>;
  Vec<T> sum[Rows][2] = {};
  for (int64_t k = 0; k < depth; ++k) {
    const Vec<T> left = load(panel + k * NR<T>), right = load(panel + k * NR<T> + W);
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r) {
      const Vec<T> x = all(a[r * a_stride + k]);
      sum[r][0] += x * left;
      sum[r][1] += x * right;
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < Rows; ++r) {
    T* row = c + r * c_stride;
    store(row, add ? load(row) + sum[r][0] : sum[r][0]);
    store(row + W, add ? load(row + W) + sum[r][1] : sum[r][1]);
  }
}

template <class T, int Rows>
void gemm_tail(int64_t rows, int64_t depth, const T* a, int64_t a_stride, const T* b, int64_t b_stride, int64_t panels,
               T* c, int64_t c_stride, bool add) {
  if constexpr (Rows > 0) {
    if (rows < Rows) return gemm_tail<T, Rows - 1>(rows, depth, a, a_stride, b, b_stride, panels, c, c_stride, add);
    for (int64_t p = 0; p < panels; ++p)
      gemm_tile<T, Rows>(depth, a, a_stride, b + p * b_stride, c + p * NR<T>, c_stride, add);
  }
}

// C (+)= A B. A: rows x depth, a_stride between rows. B: panels of depth x NR, b_stride between panels.
// C: rows x (panels NR), c_stride between rows; `add` to what is there or replace it.
template <class T>
void gemm(int64_t rows, int64_t depth, const T* a, int64_t a_stride, const T* b, int64_t b_stride, int64_t panels, T* c,
          int64_t c_stride, bool add) {
  int64_t r = 0;
  // A's rows stay in the first cache while the panels pass.
  for (; r + MR <= rows; r += MR)
    for (int64_t p = 0; p < panels; ++p)
      gemm_tile<T, MR>(depth, a + r * a_stride, a_stride, b + p * b_stride, c + r * c_stride + p * NR<T>, c_stride, add);
  gemm_tail<T, MR - 1>(rows - r, depth, a + r * a_stride, a_stride, b, b_stride, panels, c + r * c_stride, c_stride, add);
}

}  // namespace
}  // namespace bkd
