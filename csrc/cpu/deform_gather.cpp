// Modulated deformable sampling of products with the weights.
#include "deform_gather.h"

#include "convolution.h"

namespace bkd {
namespace {

// The arguments that forward and backward share.
struct Arguments {
  const Tensor &projected, &offset;
  const std::optional<Tensor>& mask;
  const Geometry geometry;

  // `output`: or its gradient. offset and mask are float32 beside bfloat16.
  Checks check(const char* function, const char* output_name, const Tensor& output,
               std::initializer_list<ScalarType> types = KERNEL_TYPES) const {
    const Checks check(function, "projected", projected, types);
    const ScalarType positions = wide(check.type());
    check.tensor("projected", projected, {ANY, ANY, ANY, ANY}, Layout::channels_last);
    check.not_empty("projected", projected, 1);
    check.tensor("offset", offset, positions, {ANY, ANY, ANY, ANY});
    geometry.check(check, projected, offset);
    const int64_t batch = offset.size(0), taps = offset.size(1) / 2;
    check.that(projected.size(0) == 1 || projected.size(0) == batch, "projected",
               "has batch " + std::to_string(projected.size(0)), "1 or " + std::to_string(batch));
    check.that(taps > 0 && offset.size(1) == 2 * taps && taps % (geometry.kernel[0] * geometry.kernel[1]) == 0,
               "offset", "has " + std::to_string(offset.size(1)) + " channels",
               "a multiple of twice the kernel's taps");
    check.that(projected.size(1) % taps == 0, "projected", "has " + std::to_string(projected.size(1)) + " channels",
               "a multiple of the " + std::to_string(taps) + " taps of offset");
    if (mask) check.tensor("mask", *mask, positions, {batch, taps, offset.size(2), offset.size(3)});
    check.tensor(output_name, output, {batch, projected.size(1) / taps, offset.size(2), offset.size(3)},
                 Layout::channels_last);
    return check;
  }

  template <class T>
  DeformGather<T> problem() const {
    DeformGather<T> p{};
    set_geometry(geometry, p);
    p.batch = offset.size(0), p.shared = projected.size(0) == 1, p.taps = offset.size(1) / 2;
    p.channels = projected.size(1) / p.taps, p.height = projected.size(2), p.width = projected.size(3);
    p.out_height = offset.size(2), p.out_width = offset.size(3);
    p.projected = data<T>(projected);
    p.offset = data<T>(offset);
    p.mask = data<T>(mask);
    return p;
  }
};

void deform_gather(int64_t tier, const Tensor& projected, const Tensor& offset, const std::optional<Tensor>& mask,
                   const Integers& kernel, const Integers& stride, const Integers& padding, const Integers& dilation,
                   const Tensor& output) {
  const Arguments given{projected, offset, mask, {kernel, stride, padding, dilation}};
  if (given.check("deform_gather", "output", output, product_types(tier)).type() == ScalarType::BFloat16) {
    BFloatDeformGather p{};
    static_cast<DeformGather<float>&>(p) = given.problem<float>();
    p.bfloat_projected = data<BFloat>(projected), p.bfloat_output = data<BFloat>(output);
    return run(deform_gather_bfloat_kernel, tier, p);
  }
  dispatch(projected, [&](auto zero) {
    using T = decltype(zero);
    DeformGather<T> p = given.problem<T>();
    p.output = data<T>(output);
    run(deform_gather_kernel<T>, tier, p);
  });
}

void deform_gather_backward(int64_t tier, const Tensor& grad, const Tensor& projected, const Tensor& offset,
                            const std::optional<Tensor>& mask, const Integers& kernel, const Integers& stride,
                            const Integers& padding, const Integers& dilation, const Tensor& grad_projected,
                            const Tensor& grad_offset, const Tensor& grad_mask) {
  const Arguments given{projected, offset, mask, {kernel, stride, padding, dilation}};
  const Checks check = given.check("deform_gather_backward", "grad", grad);
  check.result("grad_projected", grad_projected, sizes_of(projected), Layout::channels_last);
  check.result("grad_offset", grad_offset, sizes_of(offset));
  check.result("grad_mask", grad_mask, {offset.size(0), offset.size(1) / 2, offset.size(2), offset.size(3)});
  dispatch(projected, [&](auto zero) {
    using T = decltype(zero);
    DeformGather<T> p = given.problem<T>();
    p.grad = data<T>(grad);
    p.grad_projected = data<T>(grad_projected);
    p.grad_offset = data<T>(grad_offset);
    p.grad_mask = data<T>(grad_mask);
    run(deform_gather_backward_kernel<T>, tier, p);
  });
}

}  // namespace
}  // namespace bkd

STABLE_TORCH_LIBRARY_FRAGMENT(bkd_fast_native, m) {
  m.def(
      "deform_gather(int tier, Tensor projected, Tensor offset, Tensor? mask, int[] kernel_size, int[] stride, "
      "int[] padding, int[] dilation, Tensor(a!) output) -> ()");
  m.def(
      "deform_gather_backward(int tier, Tensor grad, Tensor projected, Tensor offset, Tensor? mask, int[] kernel_size, "
      "int[] stride, int[] padding, int[] dilation, Tensor(a!) grad_projected, Tensor(b!) grad_offset, "
      "Tensor(c!) grad_mask) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(bkd_fast_native, CPU, m) {
  m.impl("deform_gather", TORCH_BOX(&bkd::deform_gather));
  m.impl("deform_gather_backward", TORCH_BOX(&bkd::deform_gather_backward));
}
