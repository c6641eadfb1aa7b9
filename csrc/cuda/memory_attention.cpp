#include "memory_attention.h"

#include "bindings.h"

namespace bkd {
namespace {

void attention(const Tensor& dots, const Tensor& memory, const Tensor& query_norms, const Tensor& memory_norms,
               double threshold, double temperature, bool renormalize, bool tf32, const Tensor& kept,
               const Tensor& counts, const Tensor& output) {
  const Current current(memory);
  MemoryAttention p{};
  p.rows = static_cast<int>(dots.size(0)), p.items = static_cast<int>(memory.size(0));
  p.channels = static_cast<int>(memory.size(1));
  p.threshold = static_cast<float>(threshold), p.temperature = static_cast<float>(temperature);
  p.renormalize = renormalize;
  p.dots = data<float>(dots), p.memory = data(memory);
  p.query_norms = data<float>(query_norms), p.memory_norms = data<float>(memory_norms);
  p.most = static_cast<int>(kept.size(1)), p.kept = data(kept), p.counts = data<int>(counts);
  p.output = data(output);
  memory_attention(p, type_of(memory), tf32, current.device);
}

void gradient(const Tensor& query_norms, const Tensor& memory_norms, double threshold, double temperature,
              bool renormalize, const Tensor& dots, const Tensor& by_read, const Tensor& pull) {
  const Current current(dots);
  MemoryAttentionGradient p{};
  p.rows = static_cast<int>(dots.size(0)), p.items = static_cast<int>(dots.size(1));
  p.threshold = static_cast<float>(threshold), p.temperature = static_cast<float>(temperature);
  p.renormalize = renormalize;
  p.query_norms = data<float>(query_norms), p.memory_norms = data<float>(memory_norms);
  p.dots = data<float>(dots), p.by_read = data<float>(by_read), p.pull = data<float>(pull);
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
      "bool renormalize, Tensor(a!) dots, Tensor(b!) by_read, Tensor(c!) pull) -> ()");
}

BKD_KERNELS(m) {
  m.impl("memory_attention", TORCH_BOX(&bkd::attention));
  m.impl("memory_attention_gradient", TORCH_BOX(&bkd::gradient));
}
