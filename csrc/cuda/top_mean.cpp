// The mean of the largest values of rows: checks, and registration at the end.
#include "top_mean.h"

#include "bindings.h"

namespace bkd {
namespace {

void mean_of_largest(const Tensor& values, int64_t count, const Tensor& mean) {
  const Checks check("top_mean", "values", values, {ScalarType::Float});
  check.tensor("values", values, {ANY, ANY});
  check.in_range("the number of values", values.size(1), 1, MAX_INT);
  check.in_range("count", count, 1, values.size(1));
  check.tensor("mean", mean, {values.size(0)});
  const Current current(values);
  TopMean p{};
  p.rows = values.size(0), p.width = static_cast<unsigned>(values.size(1)), p.count = static_cast<int>(count);
  p.values = data<float>(values), p.mean = data<float>(mean);
  top_mean(p, current.device);
}

}  // namespace
}  // namespace bkd

BKD_DEFINITIONS(m) { m.def("top_mean(Tensor values, int count, Tensor(a!) mean) -> ()"); }

BKD_KERNELS(m) { m.impl("top_mean", TORCH_BOX(&bkd::mean_of_largest)); }
