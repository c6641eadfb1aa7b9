// Block-level GEMM of two tiles in shared memory, on tensor cores or not: c (kM x kN) += a b, 64 bytes of depth (K) per
// tile.
//
// An operand is stored K-major (per row of a or column of b 64 bytes of depth in swizzled 16-byte chunks) or M/N-major
// (per step of depth all rows or columns). Neither layout has bank conflicts.
#pragma once

#include "instructions.cuh"

namespace bkd {
namespace {

constexpr int kThreads = 256;  // of every GEMM block
constexpr int kDepthBytes = 64;
template <class T>
constexpr int kDepth = kDepthBytes / static_cast<int>(sizeof(T));
template <class T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

// A tile of kCount rows (of a) or columns (of b) by kDepth elements of depth. kByRows: K-major.
template <class T, int kCount, bool kByRows>
struct Tile {
  // Padding per step of depth, so that eight steps start in different banks.
  static constexpr int kPadding = sizeof(T) == 2 ? 16 : 32;
  static constexpr int kStride = kByRows ? kDepthBytes : kCount * static_cast<int>(sizeof(T)) + kPadding;
  static constexpr int kBytes = kStride * (kByRows ? kCount : kDepth<T>);

  // Byte offset of a 16-byte chunk of row (K-major) or depth (M/N-major) `row`.
  static __device__ __forceinline__ int chunk(int row, int chunk) {
    return row * kStride + (kByRows ? chunk ^ (row >> 1 & 3) : chunk) * 16;
  }
  static __device__ __forceinline__ T element(const unsigned char* tile, int index, int depth) {
    const int row = kByRows ? index : depth, column = kByRows ? depth : index;
    const int at = chunk(row, column / kVector<T>) + column % kVector<T> * static_cast<int>(sizeof(T));
    return load_shared<T>(tile + at);
  }

  // Byte offset of what this lane loads of 16 rows or columns from `first` (a multiple of 16) at depth 0.
  template <bool kIsA>
  static __device__ __forceinline__ int lane_offset(int first) {
    const int lane = threadIdx.x % kWarpSize;
    const int low = lane & 7, middle = lane >> 3 & 1, high = lane >> 4;
    const int next_index = kIsA ? middle : high, next_depth = kIsA ? high : middle;
    if constexpr (kByRows) {
      return first * kStride + chunk(low + 8 * next_index, next_depth);
    } else if constexpr (sizeof(T) == 2) {
      return chunk(low + 8 * next_depth, first / 8 + next_index);
    } else {
      return lane % 4 * kStride + (first + lane / 4) * 4;
    }
  }
  // Load the fragments of 16 rows or columns and 32 bytes of depth, from `beyond` (a multiple of 16) rows or columns
  // after those of lane_offset. As a: registers 0 to 3 of multiply(). As b: registers of columns 0 to 7, then of 8
  // to 15.
  template <bool kIsA>
  static __device__ __forceinline__ void fragments(uint32_t (&result)[4], const unsigned char* tile, int lane_offset,
                                                   int beyond, int step) {
    if constexpr (kByRows) {
      load_matrices(result, tile + (lane_offset ^ step * 32) + beyond * kStride);  // two chunks deeper
    } else if constexpr (sizeof(T) == 2) {
      load_matrices<true>(result, tile + lane_offset + step * 16 * kStride + beyond * 2);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int beside = kIsA ? i & 1 : i >> 1, deeper = kIsA ? i >> 1 : i & 1;
        const int at = lane_offset + (step * 8 + 4 * deeper) * kStride + (beyond + 8 * beside) * 4;
        result[i] = load_shared<uint32_t>(tile + at);
      }
    }
  }
};

// A thread's accumulators of c, in the layout of multiply().
// kWarpRows: warps over the rows of c, the others over its columns. By default a warp's part is nearly square, so that
// it loads few fragments.
template <int kM, int kN, int kWarpRows = (kN > kM ? 2 : 4)>
struct AccumulatorFragment {
  static constexpr int kWarpColumns = kThreads / kWarpSize / kWarpRows;
  static constexpr int kRows = kM / 16 / kWarpRows, kColumns = kN / 8 / kWarpColumns;  // 16 x 8 mma tiles per warp
  float value[kRows][kColumns][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; ++j)
#pragma unroll
        for (int k = 0; k < 4; ++k) value[i][j][k] = 0;
  }
  static __device__ __forceinline__ int first_row() {
    return threadIdx.x / kWarpSize / kWarpColumns * (kM / kWarpRows);
  }
  static __device__ __forceinline__ int first_column() {
    return threadIdx.x / kWarpSize % kWarpColumns * (kN / kWarpColumns);
  }

  // Call visit(column, each_row) for all pairs of columns of this thread; each_row(call) calls call(row,
  // c[row][column], c[row][column + 1]) for all its rows.
  template <class Visit>
  __device__ __forceinline__ void columns(Visit visit) const {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      visit(first_column() + j * 8 + lane % 4 * 2, [&](auto call) {
#pragma unroll
        for (int i = 0; i < kRows; ++i)
#pragma unroll
          for (int below = 0; below < 2; ++below) {
            call(first_row() + i * 16 + below * 8 + lane / 4, value[i][j][below * 2], value[i][j][below * 2 + 1]);
          }
      });
    }
  }
  // Call visit(row, column, c[row][column], c[row][column + 1]) for all pairs of this thread.
  template <class Visit>
  __device__ __forceinline__ void pairs(Visit visit) const {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int below = 0; below < 2; ++below)
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          visit(first_row() + i * 16 + below * 8 + lane / 4, first_column() + j * 8 + lane % 4 * 2,
                value[i][j][below * 2], value[i][j][below * 2 + 1]);
        }
  }
};

constexpr int kSteps = kDepthBytes / 32;  // mma steps per tile

// A lane's offsets into the tiles of a product, worked out before its main loop. first_a, first_b: of the tiles.
template <class A, class B, class Accumulators>
struct LaneOffsets {
  int first_a, first_b, a, b;

  __device__ __forceinline__ explicit LaneOffsets(int first_a = 0, int first_b = 0)
      : first_a(first_a),
        first_b(first_b),
        a(first_a + A::template lane_offset<true>(Accumulators::first_row())),
        b(first_b + B::template lane_offset<false>(Accumulators::first_column())) {
    keep(a), keep(b);
  }
};

// acc += a b for one step of depth. kTensor: use tensor cores if the device supports T (float as TF32).
template <class T, bool kTensor, class A, class B, int kM, int kN>
__device__ __forceinline__ void multiply_step(AccumulatorFragment<kM, kN>& acc,
                                              const LaneOffsets<A, B, AccumulatorFragment<kM, kN>>& offsets,
                                              const unsigned char* a, const unsigned char* b, int step) {
  using S = AccumulatorFragment<kM, kN>;
  if constexpr (kTensor && kHasTensorCores<T>) {
    uint32_t left[S::kRows][4];
#pragma unroll
    for (int i = 0; i < S::kRows; ++i) A::template fragments<true>(left[i], a, offsets.a, i * 16, step);
#pragma unroll
    for (int j = 0; j < S::kColumns; j += 2) {
      uint32_t right[4];
      B::template fragments<false>(right, b, offsets.b, j * 8, step);
#pragma unroll
      for (int i = 0; i < S::kRows; ++i) {
        multiply<T>(acc.value[i][j], left[i], right);
        multiply<T>(acc.value[i][j + 1], left[i], right + 2);
      }
    }
  } else {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll 1
    for (int depth = step * kDepth<T> / kSteps; depth < (step + 1) * kDepth<T> / kSteps; ++depth) {
      float left[S::kRows][2];
#pragma unroll
      for (int i = 0; i < S::kRows; ++i)
#pragma unroll
        for (int below = 0; below < 2; ++below)
          left[i][below] = wide(A::element(a + offsets.first_a, S::first_row() + i * 16 + below * 8 + lane / 4, depth));
#pragma unroll
      for (int j = 0; j < S::kColumns; ++j) {
        const int column = S::first_column() + j * 8 + lane % 4 * 2;
        const float first = wide(B::element(b + offsets.first_b, column, depth));
        const float second = wide(B::element(b + offsets.first_b, column + 1, depth));
#pragma unroll
        for (int i = 0; i < S::kRows; ++i)
#pragma unroll
          for (int below = 0; below < 2; ++below) {
            acc.value[i][j][below * 2] += left[i][below] * first;
            acc.value[i][j][below * 2 + 1] += left[i][below] * second;
          }
      }
    }
  }
}

template <class T, bool kTensor, class A, class B, int kM, int kN>
__device__ __forceinline__ void multiply_tiles(AccumulatorFragment<kM, kN>& acc,
                                               const LaneOffsets<A, B, AccumulatorFragment<kM, kN>>& lane,
                                               const unsigned char* a, const unsigned char* b) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) multiply_step<T, kTensor, A, B>(acc, lane, a, b, step);
}

}  // namespace
}  // namespace bkd
