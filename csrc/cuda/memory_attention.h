// Sparse memory attention (Eq. 6-10): what its kernels are given, and how they are started.
#pragma once

#include "launch.h"

namespace bkd {

// Products of queries with items (rows, items), in float, and items (items, channels) of whole chunks of 16 bytes.
struct MemoryAttention {
  int rows, items, channels;
  float threshold, temperature;
  bool renormalize;
  float* dots;  // overwritten
  const void* memory;
  const float* query_norms;
  const float* memory_norms;
  int most;      // weights of a row that its list has room for
  void* kept;    // (rows, most), eight bytes each
  int* counts;   // (rows); -1 where the list is too short
  void* output;  // (rows, channels)
};

void memory_attention(const MemoryAttention& p, Type type, bool tf32, const Device& device);

// One row of items a query: from dot products with the items and the gradient by what is read, in float,
// the weights that were read with, the gradient by the dot products, and what the norms take back of it.
struct MemoryAttentionGradient {
  int rows, items;
  float threshold, temperature;
  bool renormalize;
  const float* query_norms;
  const float* memory_norms;
  float* dots;     // becomes the gradient by the dot products
  float* by_read;  // (rows, items), gradient by the weights; becomes the weights
  float* pull;
};

void memory_attention_gradient(const MemoryAttentionGradient& p, const Device& device);

}  // namespace bkd
