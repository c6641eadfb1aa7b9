// From torch's tensors to the kernels of a tier.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "../common/checks.h"
#include "kernels.h"

namespace bkd {

// The tiers that this machine can run, the slowest first.
const std::vector<Tier>& tiers();
const Tier& tier_at(int64_t index);
// The kernel of a tier.
// Throws std::invalid_argument where there is no such tier.
template <class Problem>
typename Kernel<Problem>::Function kernel_of(const Kernel<Problem>& kernel, int64_t tier) {
  const std::string name = tier_at(tier).name;
#if defined(__x86_64__)
  if (name == "avx2") return kernel.avx2;
  if (name == "avx512") return kernel.avx512;
#endif
  return kernel.portable;
}
void run_parallel(int64_t tasks, Worker worker, const void* data);

// Run the kernel of a tier on as many threads as torch has.
template <class Problem>
void run(const Kernel<Problem>& kernel, int64_t tier, Problem& p) {
  p.parallel = run_parallel;
  kernel_of(kernel, tier)(p);
}

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
