// Sparse memory attention.
#include "memory_attention.h"

#include "dispatch.h"

namespace bkd {
namespace {

Checks check_arguments(const char* function, const Tensor& query, const Tensor& memory, double threshold,
                       double temperature, std::initializer_list<ScalarType> types = KERNEL_TYPES) {
  const Checks check(function, "query", query, types);
  check.tensor("memory", memory, {ANY, ANY});
  check.not_empty("memory", memory, 0);
  check.tensor("query", query, sizes_of(query));
  check.that(query.dim() > 0 && query.size(query.dim() - 1) == memory.size(1), "query",
             "has shape " + to_text(sizes_of(query)), "(..., " + std::to_string(memory.size(1)) + ")");
  check.in_range("the number of items", memory.size(0), 1, MAX_INT);
  check.that(threshold >= 0, "threshold", "is " + std::to_string(threshold), "a number from 0");
  check.that(temperature > 0, "temperature", "is " + std::to_string(temperature), "a number above 0");
  return check;
}

template <class T>
MemoryAttention<T> problem(const Tensor& query, const Tensor& memory, double threshold, double temperature,
                           bool renormalize) {
  MemoryAttention<T> p{};
  p.items = memory.size(0), p.channels = memory.size(1), p.rows = query.numel() / p.channels;
  p.threshold = static_cast<T>(threshold), p.temperature = static_cast<T>(temperature), p.renormalize = renormalize;
  p.query = data<T>(query);
  p.memory = data<T>(memory);
  return p;
}

void memory_attention(int64_t tier, const Tensor& query, const Tensor& memory, double threshold, double temperature,
                      bool renormalize, const Tensor& output) {
  const Checks check = check_arguments("memory_attention", query, memory, threshold, temperature, product_types(tier));
  check.tensor("output", output, sizes_of(query));
  if (check.type() == ScalarType::BFloat16) {
    BFloatMemoryAttention p{};
    static_cast<MemoryAttention<float>&>(p) = problem<float>(query, memory, threshold, temperature, renormalize);
    p.bfloat_query = data<BFloat>(query), p.bfloat_memory = data<BFloat>(memory);
    p.bfloat_output = data<BFloat>(output);
    return run(memory_attention_bfloat_kernel, tier, p);
  }
  dispatch(query, [&](auto zero) {
    using T = decltype(zero);
    MemoryAttention<T> p = problem<T>(query, memory, threshold, temperature, renormalize);
    p.output = data<T>(output);
    run(memory_attention_kernel<T>, tier, p);
  });
}

void memory_attention_backward(int64_t tier, const Tensor& grad, const Tensor& query, const Tensor& memory,
                               double threshold, double temperature, bool renormalize, const Tensor& grad_query,
                               const Tensor& grad_memory) {
  const Checks check = check_arguments("memory_attention_backward", query, memory, threshold, temperature);
  check.tensor("grad", grad, sizes_of(query));
  check.result("grad_query", grad_query, sizes_of(query));
  check.result("grad_memory", grad_memory, sizes_of(memory));
  dispatch(query, [&](auto zero) {
    using T = decltype(zero);
    MemoryAttention<T> p = problem<T>(query, memory, threshold, temperature, renormalize);
    p.grad = data<T>(grad);
    p.grad_query = data<T>(grad_query);
    p.grad_memory = data<T>(grad_memory);
    run(memory_attention_backward_kernel<T>, tier, p);
  });
}

}  // namespace
}  // namespace bkd

STABLE_TORCH_LIBRARY_FRAGMENT(bkd_fast_native, m) {
  m.def(
      "memory_attention(int tier, Tensor query, Tensor memory, float threshold, float temperature, bool renormalize, "
      "Tensor(a!) output) -> ()");
  m.def(
      "memory_attention_backward(int tier, Tensor grad, Tensor query, Tensor memory, float threshold, "
      "float temperature, bool renormalize, Tensor(a!) grad_query, Tensor(b!) grad_memory) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(bkd_fast_native, CPU, m) {
  m.impl("memory_attention", TORCH_BOX(&bkd::memory_attention));
  m.impl("memory_attention_backward", TORCH_BOX(&bkd::memory_attention_backward));
}
