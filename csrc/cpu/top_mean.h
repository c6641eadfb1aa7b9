// The mean of the largest values of rows: the arguments of the kernel.
#pragma once

#include "kernel.h"

namespace bkd {

// values (rows, width); mean (rows).
template <class T>
struct TopMean {
  Parallel parallel;
  int64_t rows, width, count;
  const T* values;
  T* mean;
};

BKD_DECLARE_KERNEL(top_mean, TopMean)

}  // namespace bkd
