// The template of an operator: its checks, and its registration at the end.
#include "scaled_copy.h"

#include "dispatch.h"

namespace bkd {
namespace {

void scaled_copy(int64_t tier, const Tensor& input, double scale, const Tensor& output) {
  const Checks check("scaled_copy", "input", input, {ScalarType::Float, ScalarType::Double});
  check.tensor("input", input, sizes_of(input), Layout::either);
  check.tensor("output", output, sizes_of(input), layout_of(input));
  dispatch(input, [&](auto zero) {
    using T = decltype(zero);
    ScaledCopy<T> p{};
    p.count = input.numel(), p.scale = static_cast<T>(scale);
    p.input = data<T>(input), p.output = data<T>(output);
    run(scaled_copy_kernel<T>, tier, p);
  });
}

}  // namespace
}  // namespace bkd

STABLE_TORCH_LIBRARY_FRAGMENT(bkd_fast_native, m) {
  m.def("scaled_copy(int tier, Tensor input, float scale, Tensor(a!) output) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(bkd_fast_native, CPU, m) { m.impl("scaled_copy", TORCH_BOX(&bkd::scaled_copy)); }
