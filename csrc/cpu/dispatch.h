// From torch's tensors to the kernels of a tier.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "../common/checks.h"
#include "kernel.h"

namespace bkd {

enum class Tier { portable, avx2, avx512 };

// The tiers that this machine can run, the slowest first.
const std::vector<Tier>& tiers();
// Throws std::invalid_argument where the machine has no tier of this index.
Tier tier_at(int64_t index);
void run_parallel(int64_t tasks, Worker worker, const void* data);

// Run the kernel of a tier on as many threads as torch has.
template <class Problem>
void run(const Kernel<Problem>& kernel, int64_t tier, Problem& p) {
  p.parallel = run_parallel;
  switch (tier_at(tier)) {
#if defined(__x86_64__)
    case Tier::avx2:
      return kernel.avx2(p);
    case Tier::avx512:
      return kernel.avx512(p);
#endif
    default:
      return kernel.portable(p);
  }
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
template <class T>
std::vector<T*> data(const Tensors& tensors) {
  std::vector<T*> pointers;
  for (const Tensor& tensor : tensors) pointers.push_back(data<T>(tensor));
  return pointers;
}

// What the kernels compute with.
constexpr std::initializer_list<ScalarType> KERNEL_TYPES = {ScalarType::Float, ScalarType::Double};

// Call with T{} for the element type of a tensor, which the checks have seen to be one of KERNEL_TYPES.
template <class Call>
void dispatch(const Tensor& tensor, const Call& call) {
  if (tensor.scalar_type() == ScalarType::Float)
    call(float{});
  else
    call(double{});
}

}  // namespace bkd
