// The distance of rows from the best combination of their neighbours: checks, and registration at the end.
#include "neighbor_residual.h"

#include "bindings.h"
#include "neighbor_regression.h"

namespace bkd {
namespace {

// channels: without padding to 16-byte chunks.
void residual(const Tensor& query, const Tensor& bank, const Tensor& neighbors, const Tensor& values, int64_t channels,
              double ridge, const Tensor& result, const Tensor& means) {
  const Checks check("neighbor_residual", "query", query, {ScalarType::Float});
  check.tensor("query", query, {ANY, ANY});
  const int64_t rows = query.size(0), padded = query.size(1);
  Checks("neighbor_residual", "bank", bank, KERNEL_TYPES);
  check.tensor("bank", bank, bank.scalar_type(), {ANY, padded});
  check.chunks("bank", bank, padded);
  check.in_range("the number of channels", padded, 1, MAX_INT), check.in_range("channels", channels, 1, padded);
  check.tensor("neighbors", neighbors, ScalarType::Long, {rows, ANY});
  check.in_range("the number of neighbors", neighbors.size(1), 1, kMaxNeighbors);
  check.tensor("values", values, {bank.size(0), ANY});
  check.in_range("the number of values", values.size(1), 0, MAX_INT);
  check.in_range("ridge", ridge, 1e-6, 1e6);
  check.tensor("residual", result, {rows}), check.tensor("means", means, {rows, values.size(1)});
  check.aligned("query", query), check.aligned("bank", bank);
  const Current current(query);
  NeighborResidual p{};
  p.rows = rows, p.bank_rows = bank.size(0);
  p.channels = static_cast<int>(padded), p.unpadded_channels = static_cast<int>(channels);
  p.neighbors = static_cast<int>(neighbors.size(1)), p.values = static_cast<int>(values.size(1));
  p.ridge = static_cast<float>(ridge);
  p.query = data<float>(query), p.bank = data(bank), p.neighbor = data<int64_t>(neighbors);
  p.value = data<float>(values), p.residual = data<float>(result), p.mean = data<float>(means);
  neighbor_residual(p, type_of(bank), current.device);
}

}  // namespace
}  // namespace bkd

BKD_DEFINITIONS(m) {
  m.def(
      "neighbor_residual(Tensor query, Tensor bank, Tensor neighbors, Tensor values, int channels, float ridge, "
      "Tensor(a!) residual, Tensor(b!) means) -> ()");
}

BKD_KERNELS(m) { m.impl("neighbor_residual", TORCH_BOX(&bkd::residual)); }
