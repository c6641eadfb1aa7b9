// Rows as linear combinations of their neighbours: kernel arguments and launcher.
#pragma once

#include "launch.h"

namespace bkd {

constexpr int kMaxNeighbors = 64;
constexpr int kFewNeighbors = 6;  // whose system one warp solves in registers

// query, output (rows, channels) in float32; bank (bank_rows, channels), whole 16-byte chunks; neighbor
// (rows, neighbors). A row with an index outside the bank is NaN.
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
