// The rows of a bank that are nearest to each query: kernel arguments and launcher.
#pragma once

#include "launch.h"

namespace bkd {

constexpr int kMaxNearest = 64;

// products (queries, rows) of queries and rows, half_squares (rows) half the squared norm of each row; index
// (queries, count): the rows with the largest differences of both, which are the nearest.
struct NearestRows {
  int64_t queries;
  int rows, count;
  const float* products;
  const float* half_squares;
  int64_t* index;
};

void nearest_rows(const NearestRows& p, const Device& device);

}  // namespace bkd
