// Bias, shortcut and activation of a convolution: checks, and registration at the end.
#include "bias_activation.h"

#include <limits>

#include "bindings.h"

namespace bkd {
namespace {

// Rows of whole chunks in a larger channels_last image.
bool is_slice(const Tensor& x) {
  if (x.dim() != 4 || is_laid_out(x, Layout::either)) return false;
  const int64_t chunk = 16 / static_cast<int64_t>(x.element_size());
  return x.stride(1) == 1 && x.stride(3) == x.size(1) && x.size(1) % chunk == 0 && x.stride(2) % chunk == 0 &&
         x.stride(0) % chunk == 0;
}

void activate(const Tensor& x, const Tensor& bias, const std::optional<Tensor>& residual, double low, double high,
              const Tensor& output) {
  const Checks check("bias_activation", "x", x, KERNEL_TYPES);
  const bool slice = is_slice(x);
  if (!slice) check.tensor("x", x, {ANY, ANY, ANY, ANY}, Layout::either);
  const Layout layout = slice ? Layout::channels_last : layout_of(x);
  check.tensor("bias", bias, {x.size(1)});
  check.tensor("residual", residual, sizes_of(x), layout);
  check.tensor("output", output, sizes_of(x), layout);
  check.in_range("low", low, -std::numeric_limits<double>::infinity(), high);
  check.aligned("x", x), check.aligned("bias", bias), check.aligned("output", output);
  if (residual) check.aligned("residual", *residual);
  const Current current(x);
  BiasActivation p{};
  p.count = x.numel(), p.channels = x.size(1);
  p.run = layout == Layout::channels_last ? 1 : x.size(2) * x.size(3);
  if (slice) {
    p.row = x.size(3) * p.channels, p.height = x.size(2);
    p.row_stride = x.stride(2), p.image_stride = x.stride(0);
  }
  p.low = static_cast<float>(low), p.high = static_cast<float>(high);
  p.x = data(x), p.bias = data(bias), p.residual = data(residual), p.output = data(output);
  bias_activation(p, type_of(x), current.device);
}

}  // namespace
}  // namespace bkd

BKD_DEFINITIONS(m) {
  m.def("bias_activation(Tensor x, Tensor bias, Tensor? residual, float low, float high, Tensor(a!) output) -> ()");
}

BKD_KERNELS(m) { m.impl("bias_activation", TORCH_BOX(&bkd::activate)); }
