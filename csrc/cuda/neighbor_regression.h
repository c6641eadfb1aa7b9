// Rows as combinations of their neighbours: what the kernels are given, and how they are launched.
#pragma once

#include "launch.h"

namespace bkd {

constexpr int kMaxNeighbors = 64;

// query, output (rows, channels) in float32; bank (bank_rows, channels), whole chunks of 16 bytes; neighbor
// (rows, neighbors). A row with a neighbour that is no row of the bank is NaN.
struct NeighborRegression {
  int64_t rows, bank_rows;
  int channels, neighbors;
  float ridge;
  const float* query;
  const void* bank;
  const int64_t* neighbor;
  float* output;
};

// type: of the bank.
void neighbor_regression(const NeighborRegression& p, Type type, const Device& device);

}  // namespace bkd
