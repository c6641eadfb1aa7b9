#include "dispatch.h"

namespace bkd {
namespace {

template <class T>
MemoryAttention<T> problem(const Tensor& query, const Tensor& memory, double threshold, double temperature,
                           bool renormalize) {
  MemoryAttention<T> p{};
  p.parallel = run_parallel;
  p.items = memory.size(0), p.channels = memory.size(1), p.rows = query.numel() / p.channels;
  p.threshold = static_cast<T>(threshold), p.temperature = static_cast<T>(temperature), p.renormalize = renormalize;
  p.query = data<T>(query);
  p.memory = data<T>(memory);
  return p;
}

void memory_attention(int64_t tier, const Tensor& query, const Tensor& memory, double threshold, double temperature,
                      bool renormalize, const Tensor& output) {
  dispatch(query, [&](auto zero) {
    using T = decltype(zero);
    MemoryAttention<T> p = problem<T>(query, memory, threshold, temperature, renormalize);
    p.output = data<T>(output);
    kernels_of<T>(tier).memory_attention(p);
  });
}

void memory_attention_backward(int64_t tier, const Tensor& grad, const Tensor& query, const Tensor& memory,
                               double threshold, double temperature, bool renormalize, const Tensor& grad_query,
                               const Tensor& grad_memory) {
  dispatch(query, [&](auto zero) {
    using T = decltype(zero);
    MemoryAttention<T> p = problem<T>(query, memory, threshold, temperature, renormalize);
    p.grad = data<T>(grad);
    p.grad_query = data<T>(grad_query);
    p.grad_memory = data<T>(grad_memory);
    kernels_of<T>(tier).memory_attention_backward(p);
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
