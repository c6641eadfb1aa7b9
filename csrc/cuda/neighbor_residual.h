// The distance of rows from the best combination of their neighbours: kernel arguments and launcher.
#pragma once

#include "launch.h"

namespace bkd {

// query (rows, channels) in float32; bank (bank_rows, channels), channels in whole 16-byte chunks, zero beyond
// `unpadded_channels`; neighbor (rows, neighbors), at most kMaxNeighbors; value (bank_rows, values). residual (rows),
// mean (rows, values): NaN for a row with an index outside the bank.
struct NeighborResidual {
  int64_t rows, bank_rows;
  int channels, unpadded_channels, neighbors, values;
  float ridge;
  const float* query;
  const void* bank;
  const int64_t* neighbor;
  const float* value;
  float* residual;
  float* mean;
};

// type: of the bank.
void neighbor_residual(const NeighborResidual& p, Type type, const Device& device);

}  // namespace bkd
