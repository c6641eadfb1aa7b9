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
  by_type(query, [&](auto zero) {
    using T = decltype(zero);
    MemoryAttention<T> p = problem<T>(query, memory, threshold, temperature, renormalize);
    p.output = data<T>(output);
    kernels_of<T>(tier).memory_attention(p);
  });
}

void memory_attention_backward(int64_t tier, const Tensor& grad, const Tensor& query, const Tensor& memory,
                               double threshold, double temperature, bool renormalize, const Tensor& grad_query,
                               const Tensor& grad_memory) {
  by_type(query, [&](auto zero) {
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

STABLE_TORCH_LIBRARY_IMPL(bkd_fast_native, CPU, m) {
  m.impl("memory_attention", TORCH_BOX(&bkd::memory_attention));
  m.impl("memory_attention_backward", TORCH_BOX(&bkd::memory_attention_backward));
}
