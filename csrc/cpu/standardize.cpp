// Averaged and standardised features.
#include "standardize.h"

#include "dispatch.h"

namespace bkd {
namespace {

constexpr int64_t MAX_PATCH = 255;

void standardize(int64_t tier, const Tensor& x, const Tensor& mean, const Tensor& std, int64_t patch, bool zeros,
                 const Tensor& output) {
  const Checks check("standardize", "x", x, KERNEL_TYPES);
  check.in_range("patch", patch, 1, MAX_PATCH);
  check.tensor("x", x, {ANY, ANY, ANY, ANY}, patch == 1 ? Layout::either : Layout::channels_last);
  check.tensor("mean", mean, {x.size(1)});
  check.tensor("std", std, {x.size(1)});
  check.tensor("output", output, sizes_of(x), Layout::channels_last);
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    Standardize<T> p{};
    p.images = x.size(0), p.channels = x.size(1), p.height = x.size(2), p.width = x.size(3), p.patch = patch;
    p.channels_first = !is_channels_last(x), p.zeros = zeros;
    p.x = data<T>(x), p.mean = data<T>(mean), p.std = data<T>(std), p.output = data<T>(output);
    if (output.numel()) run(standardize_kernel<T>, tier, p);
  });
}

}  // namespace
}  // namespace bkd

STABLE_TORCH_LIBRARY_FRAGMENT(bkd_fast_native, m) {
  m.def("standardize(int tier, Tensor x, Tensor mean, Tensor std, int patch, bool zeros, Tensor(a!) output) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(bkd_fast_native, CPU, m) { m.impl("standardize", TORCH_BOX(&bkd::standardize)); }
