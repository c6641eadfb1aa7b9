// Sparse memory attention.
#include "memory_attention.h"

#include "bindings.h"

namespace bkd {
namespace {

void attention(const Tensor& dots, const Tensor& memory, const Tensor& query_norms, const Tensor& memory_norms,
               double threshold, double temperature, bool renormalize, bool tf32, const Tensor& kept,
               const Tensor& counts, const Tensor& output) {
  const Checks check("memory_attention", "memory", memory, KERNEL_TYPES);
  check.tensor("memory", memory, {ANY, ANY});
  check.not_empty("memory", memory, 0), check.aligned("memory", memory), check.chunks("memory", memory, memory.size(1));
  check.tensor("dots", dots, ScalarType::Float, {ANY, memory.size(0)});
  const int64_t rows = dots.size(0), items = memory.size(0);
  check.in_range("the number of rows", rows, 0, MAX_INT), check.in_range("the number of items", items, 1, MAX_INT);
  check.tensor("query_norms", query_norms, ScalarType::Float, {rows});
  check.tensor("memory_norms", memory_norms, ScalarType::Float, {items});
  check.tensor("kept", kept, ScalarType::Float, {rows, ANY, 2});
  check.not_empty("kept", kept, 1), check.aligned("kept", kept);
  check.tensor("counts", counts, ScalarType::Int, {rows});
  check.tensor("output", output, {rows, memory.size(1)});
  check.aligned("output", output);
  const Current current(memory);
  MemoryAttention p{};
  p.rows = static_cast<int>(dots.size(0)), p.items = static_cast<int>(memory.size(0));
  p.channels = static_cast<int>(memory.size(1));
  p.threshold = static_cast<float>(threshold), p.temperature = static_cast<float>(temperature);
  p.renormalize = renormalize;
  p.dots = data<float>(dots), p.memory = data(memory);
  p.query_norms = data<float>(query_norms), p.memory_norms = data<float>(memory_norms);
  p.max_kept = static_cast<int>(kept.size(1)), p.kept = data(kept), p.counts = data<int>(counts);
  p.output = data(output);
  memory_attention(p, type_of(memory), tf32, current.device);
}

void gradient(const Tensor& query_norms, const Tensor& memory_norms, double threshold, double temperature,
              bool renormalize, const Tensor& dots, const Tensor& grad_weights, const Tensor& pull) {
  const Checks check("memory_attention_gradient", "dots", dots, {ScalarType::Float});
  check.tensor("dots", dots, {ANY, ANY});
  check.in_range("the number of rows", dots.size(0), 0, MAX_INT);
  check.in_range("the number of items", dots.size(1), 1, MAX_INT);
  check.tensor("query_norms", query_norms, {dots.size(0)});
  check.tensor("memory_norms", memory_norms, {dots.size(1)});
  check.tensor("grad_weights", grad_weights, sizes_of(dots));
  check.tensor("pull", pull, sizes_of(dots));
  const Current current(dots);
  MemoryAttentionGradient p{};
  p.rows = static_cast<int>(dots.size(0)), p.items = static_cast<int>(dots.size(1));
  p.threshold = static_cast<float>(threshold), p.temperature = static_cast<float>(temperature);
  p.renormalize = renormalize;
  p.query_norms = data<float>(query_norms), p.memory_norms = data<float>(memory_norms);
  p.dots = data<float>(dots), p.grad_weights = data<float>(grad_weights), p.pull = data<float>(pull);
  memory_attention_gradient(p, current.device);
}

}  // namespace
}  // namespace bkd

BKD_DEFINITIONS(m) {
  m.def(
      "memory_attention(Tensor(a!) dots, Tensor memory, Tensor query_norms, Tensor memory_norms, float threshold, "
      "float temperature, bool renormalize, bool tf32, Tensor(b!) kept, Tensor(c!) counts, Tensor(d!) output) -> ()");
  m.def(
      "memory_attention_gradient(Tensor query_norms, Tensor memory_norms, float threshold, float temperature, "
      "bool renormalize, Tensor(a!) dots, Tensor(b!) grad_weights, Tensor(c!) pull) -> ()");
}

BKD_KERNELS(m) {
  m.impl("memory_attention", TORCH_BOX(&bkd::attention));
  m.impl("memory_attention_gradient", TORCH_BOX(&bkd::gradient));
}
