// Rows as linear combinations of their neighbours.
#include "neighbor_regression.h"

#include "bindings.h"

namespace bkd {
namespace {

void regression(const Tensor& query, const Tensor& bank, const Tensor& neighbors, double ridge, const Tensor& output) {
  const Checks check("neighbor_regression", "query", query, {ScalarType::Float});
  check.tensor("query", query, {ANY, ANY});
  const int64_t rows = query.size(0), channels = query.size(1);
  Checks("neighbor_regression", "bank", bank, KERNEL_TYPES);
  check.tensor("bank", bank, bank.scalar_type(), {ANY, channels});
  const int64_t bytes = channels * static_cast<int64_t>(bank.element_size());
  check.that(bytes % 16 == 0, "bank", "has rows of " + std::to_string(bytes) + " bytes", "whole chunks of 16");
  check.in_range("the number of channels", channels, 0, MAX_INT);
  check.tensor("neighbors", neighbors, ScalarType::Long, {rows, ANY});
  check.in_range("the number of neighbors", neighbors.size(1), 1, kMaxNeighbors);
  check.in_range("ridge", ridge, 1e-6, 1e6);
  check.tensor("output", output, {rows, channels});
  check.aligned("query", query), check.aligned("bank", bank), check.aligned("output", output);
  const Current current(query);
  NeighborRegression p{};
  p.rows = rows, p.bank_rows = bank.size(0);
  p.channels = static_cast<int>(channels), p.neighbors = static_cast<int>(neighbors.size(1));
  p.ridge = static_cast<float>(ridge);
  p.query = data<float>(query), p.bank = data(bank), p.neighbor = data<int64_t>(neighbors);
  p.output = data<float>(output);
  neighbor_regression(p, type_of(bank), current.device);
}

}  // namespace
}  // namespace bkd

BKD_DEFINITIONS(m) {
  m.def("neighbor_regression(Tensor query, Tensor bank, Tensor neighbors, float ridge, Tensor(a!) output) -> ()");
}

BKD_KERNELS(m) { m.impl("neighbor_regression", TORCH_BOX(&bkd::regression)); }
