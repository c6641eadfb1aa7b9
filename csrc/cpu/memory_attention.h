// Sparse memory attention: the arguments of its kernels.
#pragma once

#include "kernel.h"

namespace bkd {

// query, output (R, C); memory (I, C); contiguous.
template <class T>
struct MemoryAttention {
  Parallel parallel;
  int64_t rows, items, channels;
  T threshold, temperature;
  bool renormalize;
  const T* query;
  const T* memory;
  T* output;
  const T* grad;
  T* grad_query;
  T* grad_memory;
};

// The forward of bfloat16, of which these are query, memory and output.
struct BFloatMemoryAttention : MemoryAttention<float> {
  const BFloat* bfloat_query;
  const BFloat* bfloat_memory;
  BFloat* bfloat_output;
};

BKD_DECLARE_KERNEL(memory_attention, MemoryAttention)
BKD_DECLARE_KERNEL(memory_attention_backward, MemoryAttention)
BKD_DECLARE_BFLOAT_KERNEL(memory_attention_bfloat, BFloatMemoryAttention)

}  // namespace bkd
