// Rows as combinations of their neighbours: the arguments of the kernel.
#pragma once

#include "kernel.h"

namespace bkd {

constexpr int64_t MAX_NEIGHBORS = 64;

// query, output (rows, channels); bank (M, channels); neighbor (rows, neighbors) of 0 to M - 1; contiguous.
template <class T>
struct NeighborRegression {
  Parallel parallel;
  int64_t rows, channels, neighbors;
  T ridge;
  const T* query;
  const char* bank;
  Numbers numbers;  // of the bank
  int64_t bytes;    // of one of them
  const int64_t* neighbor;
  T* output;
};

BKD_DECLARE_KERNEL(neighbor_regression, NeighborRegression)

}  // namespace bkd
