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

enum class Tier { portable, avx2, avx512, avx512bf16, amx };

// The tiers that this machine can run, the slowest first.
const std::vector<Tier>& tiers();
// Throws std::invalid_argument where the machine has no tier of this index, or Linux does not let it use its tiles.
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
    case Tier::avx512bf16:  // which differs in kernels of bfloat16 alone, as does the next
    case Tier::amx:
      return kernel.avx512(p);
#endif
    default:
      return kernel.portable(p);
  }
}

// The same for a kernel of bfloat16: the checks have seen that the tier is one of those that have it (product_types).
template <class Problem>
void run(const BFloatKernel<Problem>& kernel, int64_t tier, Problem& p) {
  p.parallel = run_parallel;
#if defined(BKD_AMX)
  if (tier_at(tier) == Tier::amx) return kernel.amx(p);
#endif
#if defined(__x86_64__)
  kernel.avx512bf16(p);
#endif
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
// The same and bfloat16, for a kernel with products of it and a tier that multiplies it.
constexpr std::initializer_list<ScalarType> KERNEL_TYPES_AND_BFLOAT = {ScalarType::Float, ScalarType::Double,
                                                                       ScalarType::BFloat16};
inline std::initializer_list<ScalarType> product_types(int64_t tier) {
  return tier_at(tier) >= Tier::avx512bf16 ? KERNEL_TYPES_AND_BFLOAT : KERNEL_TYPES;
}
// The type of sums, and of what is not multiplied.
inline ScalarType wide(ScalarType type) { return type == ScalarType::BFloat16 ? ScalarType::Float : type; }

inline Numbers numbers_of(const Tensor& tensor) {
  if (tensor.scalar_type() == ScalarType::Half) return Numbers::Half;
  if (tensor.scalar_type() == ScalarType::BFloat16) return Numbers::BFloat;
  return Numbers::Same;
}

// Call with T{} for the element type of a tensor, which the checks have seen to be one of KERNEL_TYPES.
template <class Call>
void dispatch(const Tensor& tensor, const Call& call) {
  if (tensor.scalar_type() == ScalarType::Float)
    call(float{});
  else
    call(double{});
}

}  // namespace bkd
