// The mean of the largest values of rows: what the kernel is given, and how it is launched.
#pragma once

#include "launch.h"

namespace bkd {

// values (rows, width); mean (rows).
struct TopMean {
  int64_t rows;
  unsigned width;  // at most 2^31 - 1
  int count;
  const float* values;
  float* mean;
};

void top_mean(const TopMean& p, const Device& device);

}  // namespace bkd
