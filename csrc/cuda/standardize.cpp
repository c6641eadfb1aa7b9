// Averaged and standardised features: checks, and registration at the end.
#include "standardize.h"

#include "bindings.h"

namespace bkd {
namespace {

constexpr int64_t kMaxPatch = 255;

void standardized(const Tensor& x, const Tensor& mean, const Tensor& std, int64_t patch, double border,
                  const Tensor& output) {
  const Checks check("standardize", "x", x, KERNEL_TYPES);
  check.tensor("x", x, {ANY, ANY, ANY, ANY}, Layout::either);
  const int64_t channels = x.size(1), height = x.size(2), width = x.size(3);
  check.tensor("mean", mean, ScalarType::Float, {channels});
  check.tensor("std", std, ScalarType::Float, {channels});
  check.in_range("patch", patch, 1, kMaxPatch);
  check.in_range("border", border, 0.0, 1.0);
  check.in_range("the size of an image", channels * height * width, 0, MAX_INT);
  check.tensor("output", output, ScalarType::Float, sizes_of(x), Layout::channels_last);
  check.aligned("x", x), check.aligned("mean", mean), check.aligned("std", std), check.aligned("output", output);
  const Current current(x);
  Standardize p{};
  p.images = x.size(0), p.channels = static_cast<int>(channels), p.height = static_cast<int>(height);
  p.width = static_cast<int>(width), p.patch = static_cast<int>(patch), p.border = static_cast<float>(border);
  p.channels_first = !is_channels_last(x);
  p.x = data(x), p.mean = data<float>(mean), p.std = data<float>(std), p.output = data<float>(output);
  standardize(p, type_of(x), current.device);
}

}  // namespace
}  // namespace bkd

BKD_DEFINITIONS(m) {
  m.def("standardize(Tensor x, Tensor mean, Tensor std, int patch, float border, Tensor(a!) output) -> ()");
}

BKD_KERNELS(m) { m.impl("standardize", TORCH_BOX(&bkd::standardized)); }
