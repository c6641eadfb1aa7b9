// Modulated deformable convolution.
#include "deform_conv.h"

#include "convolution.h"

namespace bkd {
namespace {

// The arguments that forward and backward share.
struct Arguments {
  const Tensor &input, &offset;
  const std::optional<Tensor>& mask;
  const Tensor& weight;
  const Integers &stride, &padding, &dilation;

  // `output`: or its gradient. offset and mask are float32 beside bfloat16.
  Checks check(const char* function, const char* output_name, const Tensor& output,
               std::initializer_list<ScalarType> types = KERNEL_TYPES) const {
    const Checks check(function, "input", input, types);
    const ScalarType positions = wide(check.type());
    check.tensor("input", input, {ANY, ANY, ANY, ANY}, Layout::channels_last);
    check.tensor("weight", weight, {ANY, ANY, ANY, ANY});
    check.not_empty("input", input, 1), check.not_empty("weight", weight, 0);
    const int64_t batch = input.size(0), channels = input.size(1), outputs = weight.size(0), part = weight.size(1);
    check.that(channels % part == 0 && outputs % (channels / part) == 0, "weight",
               "has shape " + to_text(sizes_of(weight)),
               "groups that divide the " + std::to_string(channels) + " channels of input and its own size 0");
    check.tensor("offset", offset, positions, {batch, ANY, ANY, ANY});
    const Integers kernel = {weight.size(2), weight.size(3)};
    Geometry{kernel, stride, padding, dilation}.check(check, input, offset);
    const int64_t taps = kernel[0] * kernel[1], groups = offset.size(1) / (2 * taps);
    check.that(groups > 0 && offset.size(1) == 2 * groups * taps && channels % groups == 0, "offset",
               "has " + std::to_string(offset.size(1)) + " channels",
               "2 * G * " + std::to_string(taps) + " with G that divides the " + std::to_string(channels) +
                   " channels of input");
    if (mask) check.tensor("mask", *mask, positions, {batch, groups * taps, offset.size(2), offset.size(3)});
    check.tensor(output_name, output, {batch, outputs, offset.size(2), offset.size(3)}, Layout::either);
    return check;
  }

  template <class T>
  DeformConv<T> problem(const Tensor& output) const {
    DeformConv<T> p{};
    const Integers kernel = {weight.size(2), weight.size(3)};
    set_geometry({kernel, stride, padding, dilation}, p);
    p.batch = input.size(0), p.channels = input.size(1), p.height = input.size(2), p.width = input.size(3);
    p.outputs = weight.size(0), p.out_height = offset.size(2), p.out_width = offset.size(3);
    p.groups = p.channels / weight.size(1);
    p.offset_groups = offset.size(1) / (2 * p.taps());
    p.input = data<T>(input);
    p.offset = data<T>(offset);
    p.mask = data<T>(mask);
    p.weight = data<T>(weight);
    const bool channels_first = output.is_contiguous();
    p.output_channel_stride = channels_first ? p.pixels() : 1;
    p.output_pixel_stride = channels_first ? 1 : p.outputs;
    return p;
  }
};

void deform_conv(int64_t tier, const Tensor& input, const Tensor& offset, const std::optional<Tensor>& mask,
                 const Tensor& weight, const std::optional<Tensor>& bias, const Integers& stride,
                 const Integers& padding, const Integers& dilation, const Tensor& output) {
  const Arguments given{input, offset, mask, weight, stride, padding, dilation};
  const Checks check = given.check("deform_conv", "output", output, product_types(tier));
  if (bias) check.tensor("bias", *bias, wide(check.type()), {weight.size(0)});
  if (check.type() == ScalarType::BFloat16) {
    BFloatDeformConv p{};
    static_cast<DeformConv<float>&>(p) = given.problem<float>(output);
    p.bias = data<float>(bias);
    p.bfloat_input = data<BFloat>(input), p.bfloat_weight = data<BFloat>(weight);
    p.bfloat_output = data<BFloat>(output);
    return run(deform_conv_bfloat_kernel, tier, p);
  }
  dispatch(input, [&](auto zero) {
    using T = decltype(zero);
    DeformConv<T> p = given.problem<T>(output);
    p.bias = data<T>(bias);
    p.output = data<T>(output);
    run(deform_conv_kernel<T>, tier, p);
  });
}

void deform_conv_backward(int64_t tier, const Tensor& grad, const Tensor& input, const Tensor& offset,
                          const std::optional<Tensor>& mask, const Tensor& weight, const Integers& stride,
                          const Integers& padding, const Integers& dilation, const Tensor& grad_input,
                          const Tensor& grad_offset, const Tensor& grad_mask, const Tensor& grad_weight) {
  const Arguments given{input, offset, mask, weight, stride, padding, dilation};
  const Checks check = given.check("deform_conv_backward", "grad", grad);
  check.result("grad_input", grad_input, sizes_of(input), Layout::channels_last);
  check.result("grad_offset", grad_offset, sizes_of(offset));
  check.result("grad_mask", grad_mask, {offset.size(0), offset.size(1) / 2, offset.size(2), offset.size(3)});
  check.result("grad_weight", grad_weight, sizes_of(weight));
  dispatch(input, [&](auto zero) {
    using T = decltype(zero);
    DeformConv<T> p = given.problem<T>(grad);
    p.grad = data<T>(grad);
    p.grad_input = data<T>(grad_input);
    p.grad_offset = data<T>(grad_offset);
    p.grad_mask = data<T>(grad_mask);
    p.grad_weight = data<T>(grad_weight);
    run(deform_conv_backward_kernel<T>, tier, p);
  });
}

}  // namespace
}  // namespace bkd

STABLE_TORCH_LIBRARY_FRAGMENT(bkd_fast_native, m) {
  m.def(
      "deform_conv(int tier, Tensor input, Tensor offset, Tensor? mask, Tensor weight, Tensor? bias, int[] stride, "
      "int[] padding, int[] dilation, Tensor(a!) output) -> ()");
  m.def(
      "deform_conv_backward(int tier, Tensor grad, Tensor input, Tensor offset, Tensor? mask, Tensor weight, "
      "int[] stride, int[] padding, int[] dilation, Tensor(a!) grad_input, Tensor(b!) grad_offset, "
      "Tensor(c!) grad_mask, Tensor(d!) grad_weight) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(bkd_fast_native, CPU, m) {
  m.impl("deform_conv", TORCH_BOX(&bkd::deform_conv));
  m.impl("deform_conv_backward", TORCH_BOX(&bkd::deform_conv_backward));
}
