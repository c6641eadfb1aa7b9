// The rows of a bank that are nearest to each query: checks, and registration at the end.
#include "nearest_rows.h"

#include <algorithm>

#include "bindings.h"

namespace bkd {
namespace {

void nearest(const Tensor& products, const Tensor& half_squares, const Tensor& index) {
  const Checks check("nearest_rows", "products", products, {ScalarType::Float});
  check.tensor("products", products, {ANY, ANY});
  const int64_t queries = products.size(0), rows = products.size(1);
  check.in_range("the number of rows", rows, 1, MAX_INT);
  check.tensor("half_squares", half_squares, {rows});
  check.tensor("index", index, ScalarType::Long, {queries, ANY});
  check.in_range("the number of rows to find", index.size(1), 1, std::min<int64_t>(rows, kMaxNearest));
  const Current current(products);
  NearestRows p{};
  p.queries = queries, p.rows = static_cast<int>(rows), p.count = static_cast<int>(index.size(1));
  p.products = data<float>(products), p.half_squares = data<float>(half_squares), p.index = data<int64_t>(index);
  nearest_rows(p, current.device);
}

}  // namespace
}  // namespace bkd

BKD_DEFINITIONS(m) { m.def("nearest_rows(Tensor products, Tensor half_squares, Tensor(a!) index) -> ()"); }

BKD_KERNELS(m) { m.impl("nearest_rows", TORCH_BOX(&bkd::nearest)); }
