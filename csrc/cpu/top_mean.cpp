// The mean of the largest values of rows.
#include "top_mean.h"

#include "dispatch.h"

namespace bkd {
namespace {

void top_mean(int64_t tier, const Tensor& values, int64_t count, const Tensor& mean) {
  const Checks check("top_mean", "values", values, KERNEL_TYPES);
  check.tensor("values", values, {ANY, ANY});
  check.in_range("count", count, 1, values.size(1));
  check.tensor("mean", mean, {values.size(0)});
  dispatch(values, [&](auto zero) {
    using T = decltype(zero);
    TopMean<T> p{};
    p.rows = values.size(0), p.width = values.size(1), p.count = count;
    p.values = data<T>(values), p.mean = data<T>(mean);
    run(top_mean_kernel<T>, tier, p);
  });
}

}  // namespace
}  // namespace bkd

STABLE_TORCH_LIBRARY_FRAGMENT(bkd_fast_native, m) {
  m.def("top_mean(int tier, Tensor values, int count, Tensor(a!) mean) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(bkd_fast_native, CPU, m) { m.impl("top_mean", TORCH_BOX(&bkd::top_mean)); }
