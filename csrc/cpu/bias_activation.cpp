// Bias, shortcut and activation of a convolution.
#include "bias_activation.h"

#include <limits>

#include "dispatch.h"

namespace bkd {
namespace {

void bias_activation(int64_t tier, const Tensor& x, const Tensor& bias, const std::optional<Tensor>& residual,
                     double low, double high, const Tensor& output) {
  const Checks check("bias_activation", "x", x, KERNEL_TYPES);
  check.tensor("x", x, {ANY, ANY, ANY, ANY}, Layout::either);
  const Layout layout = layout_of(x);
  check.tensor("bias", bias, {x.size(1)});
  check.tensor("residual", residual, sizes_of(x), layout);
  check.tensor("output", output, sizes_of(x), layout);
  check.in_range("low", low, -std::numeric_limits<double>::infinity(), high);
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    BiasActivation<T> p{};
    p.channels = x.size(1), p.channels_last = layout == Layout::channels_last;
    p.length = p.channels_last ? p.channels : x.size(2) * x.size(3);
    p.rows = p.length ? x.numel() / p.length : 0;
    p.low = static_cast<T>(low), p.high = static_cast<T>(high);
    p.x = data<T>(x), p.bias = data<T>(bias), p.residual = data<T>(residual), p.output = data<T>(output);
    run(bias_activation_kernel<T>, tier, p);
  });
}

}  // namespace
}  // namespace bkd

STABLE_TORCH_LIBRARY_FRAGMENT(bkd_fast_native, m) {
  m.def(
      "bias_activation(int tier, Tensor x, Tensor bias, Tensor? residual, float low, float high, Tensor(a!) output) "
      "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(bkd_fast_native, CPU, m) { m.impl("bias_activation", TORCH_BOX(&bkd::bias_activation)); }
