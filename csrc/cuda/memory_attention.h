// Sparse memory attention (Eq. 6-10): kernel arguments and launchers.
#pragma once

#include "launch.h"

namespace bkd {

// dots: float32 dot products of queries and items (rows, items). memory: (items, channels), whole 16-byte chunks.
struct MemoryAttention {
  int rows, items, channels;
  float threshold, temperature;
  bool renormalize;
  float* dots;  // overwritten
  const void* memory;
  const float* query_norms;
  const float* memory_norms;
  int max_kept;  // capacity of a row's list
  void* kept;    // (rows, max_kept), 8 bytes each
  int* counts;   // (rows); -1: the list overflowed
  void* output;  // (rows, channels)
};

void memory_attention(const MemoryAttention& p, Type type, bool tf32, const Device& device);

// One row of items per query, all in float32. Inputs: dot products, and gradients with respect to the weights. Outputs:
// the weights, gradients with respect to the dot products, and `pull`, the part of the gradient that the norms take.
struct MemoryAttentionGradient {
  int rows, items;
  float threshold, temperature;
  bool renormalize;
  const float* query_norms;
  const float* memory_norms;
  float* dots;          // overwritten by the gradient with respect to the dot products
  float* grad_weights;  // (rows, items), overwritten by the weights
  float* pull;
};

void memory_attention_gradient(const MemoryAttentionGradient& p, const Device& device);

}  // namespace bkd
