// The rows of a bank that are nearest to each query: the arguments of the kernel.
#pragma once

#include "kernel.h"

namespace bkd {

constexpr int64_t MAX_NEAREST = 64;

// query (rows, channels), bank (bank_rows, channels), half_squares (bank_rows) half the squared norm of each;
// products (rows, bank_rows) of query and bank, each off by at most `error` times the norms of both; index (rows,
// count).
template <class T>
struct NearestRows {
  Parallel parallel;
  int64_t rows, bank_rows, channels, count;
  T error;
  const T* query;
  const T* bank;
  const T* half_squares;
  const char* products;
  Numbers numbers;  // of the products
  int64_t bytes;    // of one of them
  int64_t* index;
};

BKD_DECLARE_KERNEL(nearest_rows, NearestRows)

}  // namespace bkd
