// The rows of a bank that are nearest to each query.
#include "nearest_rows.h"

#include "dispatch.h"

namespace bkd {
namespace {

void nearest_rows(int64_t tier, const Tensor& query, const Tensor& bank, const Tensor& half_squares,
                  const Tensor& products, double error, const Tensor& index) {
  const Checks check("nearest_rows", "query", query, KERNEL_TYPES);
  check.tensor("query", query, {ANY, ANY});
  const int64_t rows = query.size(0), channels = query.size(1);
  check.tensor("bank", bank, {ANY, channels});
  const int64_t bank_rows = bank.size(0);
  check.tensor("half_squares", half_squares, {bank_rows});
  const bool half = numbers_of(products) == Numbers::BFloat && check.type() == ScalarType::Float;
  check.tensor("products", products, half ? products.scalar_type() : check.type(), {rows, bank_rows});
  check.in_range("error", error, 0, 1);
  check.tensor("index", index, ScalarType::Long, {rows, ANY});
  check.in_range("the number of rows to find", index.size(1), 1, bank_rows < MAX_NEAREST ? bank_rows : MAX_NEAREST);
  dispatch(query, [&](auto zero) {
    using T = decltype(zero);
    NearestRows<T> p{};
    p.rows = rows, p.bank_rows = bank_rows, p.channels = channels, p.count = index.size(1);
    p.error = static_cast<T>(error);
    p.query = data<T>(query), p.bank = data<T>(bank), p.half_squares = data<T>(half_squares);
    p.products = data<char>(products), p.numbers = numbers_of(products), p.bytes = products.element_size();
    p.index = data<int64_t>(index);
    run(nearest_rows_kernel<T>, tier, p);
  });
}

}  // namespace
}  // namespace bkd

STABLE_TORCH_LIBRARY_FRAGMENT(bkd_fast_native, m) {
  m.def(
      "nearest_rows(int tier, Tensor query, Tensor bank, Tensor half_squares, Tensor products, float error, "
      "Tensor(a!) index) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(bkd_fast_native, CPU, m) { m.impl("nearest_rows", TORCH_BOX(&bkd::nearest_rows)); }
