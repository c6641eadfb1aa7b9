// Rows as combinations of their neighbours.
#include "neighbor_regression.h"

#include <algorithm>

#include "dispatch.h"

namespace bkd {
namespace {

void check_arguments(const Tensor& query, const Tensor& bank, const Tensor& neighbors, double ridge,
                     const Tensor& output) {
  const Checks check("neighbor_regression", "query", query, KERNEL_TYPES);
  check.tensor("query", query, {ANY, ANY});
  const int64_t rows = query.size(0), channels = query.size(1);
  const bool half = numbers_of(bank) != Numbers::Same && check.type() == ScalarType::Float;
  check.tensor("bank", bank, half ? bank.scalar_type() : check.type(), {ANY, channels});
  check.tensor("neighbors", neighbors, ScalarType::Long, {rows, ANY});
  check.in_range("the number of neighbors", neighbors.size(1), 1, MAX_NEIGHBORS);
  check.in_range("ridge", ridge, 1e-6, 1e6);
  check.tensor("output", output, {rows, channels});
  const int64_t *first = data<int64_t>(neighbors), last = bank.size(0) - 1;
  if (!neighbors.numel()) return;
  const auto range = std::minmax_element(first, first + neighbors.numel());
  check.in_range("a neighbor", *range.first, 0, last);
  check.in_range("a neighbor", *range.second, 0, last);
}

void neighbor_regression(int64_t tier, const Tensor& query, const Tensor& bank, const Tensor& neighbors, double ridge,
                         const Tensor& output) {
  check_arguments(query, bank, neighbors, ridge, output);
  dispatch(query, [&](auto zero) {
    using T = decltype(zero);
    NeighborRegression<T> p{};
    p.rows = query.size(0), p.channels = query.size(1), p.neighbors = neighbors.size(1),
    p.ridge = static_cast<T>(ridge);
    p.query = data<T>(query);
    p.bank = data<char>(bank), p.numbers = numbers_of(bank), p.bytes = bank.element_size();
    p.neighbor = data<int64_t>(neighbors), p.output = data<T>(output);
    run(neighbor_regression_kernel<T>, tier, p);
  });
}

}  // namespace
}  // namespace bkd

STABLE_TORCH_LIBRARY_FRAGMENT(bkd_fast_native, m) {
  m.def(
      "neighbor_regression(int tier, Tensor query, Tensor bank, Tensor neighbors, float ridge, Tensor(a!) output) "
      "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(bkd_fast_native, CPU, m) {
  m.impl("neighbor_regression", TORCH_BOX(&bkd::neighbor_regression));
}
