// From torch's tensors to the kernels of a tier.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "kernels.h"

namespace bkd {

using torch::stable::Tensor;
using Integers = std::vector<int64_t>;

// The tiers that this machine can run, the slowest first.
const std::vector<Tier>& tiers();
const Tier& tier_at(int64_t index);
void run_parallel(int64_t tasks, Worker worker, const void* data);

template <class T>
const Kernels<T>& kernels_of(int64_t tier) {
  if constexpr (sizeof(T) == 4)
    return tier_at(tier).single;
  else
    return tier_at(tier).twice;
}

// Null where there are no elements.
template <class T>
T* data(const Tensor& tensor) {
  return tensor.numel() ? static_cast<T*>(tensor.data_ptr()) : nullptr;
}
template <class T>
const T* data(const std::optional<Tensor>& tensor) {
  return tensor ? data<T>(*tensor) : nullptr;
}

// call(T{}) for the element type of a tensor; the Python side has seen to it that there are only these two.
template <class Call>
void dispatch(const Tensor& tensor, const Call& call) {
  if (tensor.element_size() == sizeof(float))
    call(float{});
  else
    call(double{});
}

}  // namespace bkd
