// Modulated deformable convolution.
#include "deform_conv.h"

#include "bindings.h"
#include "conv_policy.h"
#include "convolution.h"

namespace bkd {
namespace {

// outputs: channels of the output. part: input channels per group.
Checks check_arguments(const char* function, const Tensor& input, const Tensor& offset,
                       const std::optional<Tensor>& mask, int64_t outputs, int64_t part, const Integers& kernel,
                       const Integers& stride, const Integers& padding, const Integers& dilation,
                       int64_t offset_groups) {
  const Checks check(function, "input", input, KERNEL_TYPES);
  check.tensor("input", input, {ANY, ANY, ANY, ANY}, Layout::channels_last);
  check.not_empty("input", input, 1), check.aligned("input", input);
  const int64_t channels = input.size(1);
  check.that(part > 0 && channels % part == 0 && outputs > 0 && outputs % (channels / part) == 0, "weight",
             "has " + std::to_string(outputs) + " outputs and " + std::to_string(part) + " channels",
             "groups that divide both");
  check.in_range("offset_groups", offset_groups, 1, channels);
  check.that(channels % offset_groups == 0, "offset_groups", "is " + std::to_string(offset_groups),
             "a divisor of the " + std::to_string(channels) + " channels of input");
  check.chunks("input", input, part), check.chunks("input", input, channels / offset_groups);
  check_sampling(check, input, input.size(0), offset, mask, {kernel, stride, padding, dilation}, offset_groups);
  check.in_range("the depth of the product", part * kernel[0] * kernel[1], 1, MAX_INT);
  return check;
}

void check_weight(const Checks& check, const Tensor& weight) {
  check.tensor("weight", weight, {ANY, ANY, ANY, ANY}, Layout::channels_last);
  check.not_empty("weight", weight, 0), check.aligned("weight", weight);
}

DeformConv problem(const Tensor& input, const Tensor& offset, const std::optional<Tensor>& mask, int64_t outputs,
                   int64_t groups, const Integers& kernel, const Integers& stride, const Integers& padding,
                   const Integers& dilation, int64_t offset_groups) {
  DeformConv p{};
  p.sampling = sampling(offset, mask, input.size(2), input.size(3), kernel, stride, padding, dilation);
  p.pixels = static_cast<int>(offset.size(0)) * p.sampling.pixels();
  p.channels = static_cast<int>(input.size(1)), p.outputs = static_cast<int>(outputs);
  p.groups = static_cast<int>(groups), p.offset_groups = static_cast<int>(offset_groups);
  p.group_channels = p.channels / p.groups, p.group_outputs = p.outputs / p.groups;
  p.offset_channels = p.channels / p.offset_groups;
  p.input_line = static_cast<uint32_t>(input.size(1) * static_cast<int64_t>(input.element_size()));
  p.input = data(input);
  return p;
}

void conv(const Tensor& input, const Tensor& offset, const std::optional<Tensor>& mask, const Tensor& weight,
          const std::optional<Tensor>& bias, const Integers& stride, const Integers& padding, const Integers& dilation,
          int64_t offset_groups, bool tf32, bool wgmma, const Tensor& output) {
  check_dimensions("deform_conv", "weight", weight, 4);
  const Checks check = check_arguments("deform_conv", input, offset, mask, weight.size(0), weight.size(1),
                                       {weight.size(2), weight.size(3)}, stride, padding, dilation, offset_groups);
  check_weight(check, weight);
  check.tensor("bias", bias, {weight.size(0)});
  check.tensor("output", output, {input.size(0), weight.size(0), offset.size(2), offset.size(3)},
               Layout::channels_last);
  const Current current(input);
  DeformConv p = problem(input, offset, mask, weight.size(0), input.size(1) / weight.size(1),
                         {weight.size(2), weight.size(3)}, stride, padding, dilation, offset_groups);
  p.weight = data(weight);
  p.bias = data(bias);
  p.output = data(output);
  p.plan = plan_conv(p, tf32 || !is_float(input), current.device);
  if (wgmma && !is_float(input) && has_wgmma()) p.plan = plan_wgmma(p, p.plan, current.device);
  std::optional<Tensor> partial, arranged;
  if (p.plan.parts > 1) {
    const int64_t sizes[] = {p.plan.parts, p.pixels, p.outputs};
    partial = torch::stable::new_empty(input, sizes, ScalarType::Float);
    p.partial = data<float>(partial);
  }
  if (p.plan.arranged) {
    const int64_t sizes[] = {p.plan.arranged / 2};
    arranged = torch::stable::new_empty(input, sizes);
    p.arranged = data(arranged);
  }
  deform_conv(p, type_of(input), tf32, current.device);
}

bool conv_has_wgmma(const Tensor& input) {
  const Current current(input);
  return has_wgmma();
}

void conv_backward(const Tensor& grad, const Tensor& input, const Tensor& offset, const std::optional<Tensor>& mask,
                   const Tensor& weight, const Integers& stride, const Integers& padding, const Integers& dilation,
                   int64_t offset_groups, bool tf32, const Tensor& grad_input, const std::optional<Tensor>& scale,
                   const Tensor& grad_offset, const Tensor& grad_mask) {
  check_dimensions("deform_conv_backward", "weight", weight, 4);
  const Checks check = check_arguments("deform_conv_backward", input, offset, mask, weight.size(0), weight.size(1),
                                       {weight.size(2), weight.size(3)}, stride, padding, dilation, offset_groups);
  check_weight(check, weight);
  check.tensor("grad", grad, {input.size(0), weight.size(0), offset.size(2), offset.size(3)}, Layout::channels_last);
  check.aligned("grad", grad), check.chunks("grad", grad, weight.size(0) / (input.size(1) / weight.size(1)));
  check_sampling_gradients(check, "grad_input", grad_input, input, scale, grad_offset, offset, grad_mask, mask);
  const Current current(input);
  DeformConv p = problem(input, offset, mask, weight.size(0), input.size(1) / weight.size(1),
                         {weight.size(2), weight.size(3)}, stride, padding, dilation, offset_groups);
  p.weight = data(weight);
  p.grad = data(grad);
  p.grad_input = accumulator(grad_input, scale);
  p.grad_sampling = {data<float>(grad_offset), data<float>(grad_mask)};
  deform_conv_backward(p, type_of(input), tf32, current.device);
}

void conv_weight(const Tensor& grad, const Tensor& input, const Tensor& offset, const std::optional<Tensor>& mask,
                 const Integers& kernel, const Integers& stride, const Integers& padding, const Integers& dilation,
                 int64_t offset_groups, bool tf32, const Tensor& grad_weight) {
  check_dimensions("deform_conv_weight", "grad", grad, 4);
  check_dimensions("deform_conv_weight", "grad_weight", grad_weight, 4);
  const Checks check = check_arguments("deform_conv_weight", input, offset, mask, grad.size(1), grad_weight.size(3),
                                       kernel, stride, padding, dilation, offset_groups);
  check.tensor("grad", grad, {input.size(0), ANY, offset.size(2), offset.size(3)}, Layout::channels_last);
  check.aligned("grad", grad), check.chunks("grad", grad, grad.size(1) / (input.size(1) / grad_weight.size(3)));
  check.tensor("grad_weight", grad_weight, ScalarType::Float, {ANY, grad.size(1), kernel[0] * kernel[1], ANY});
  const Current current(input);  // grad_weight: (parts, outputs, taps, channels / groups)
  DeformConv p = problem(input, offset, mask, grad.size(1), input.size(1) / grad_weight.size(3), kernel, stride,
                         padding, dilation, offset_groups);
  p.grad = data(grad);
  p.grad_weight = data<float>(grad_weight);
  p.parts = static_cast<int>(grad_weight.size(0));
  deform_conv_weight(p, type_of(input), tf32, current.device);
}

}  // namespace
}  // namespace bkd

BKD_DEFINITIONS(m) {
  m.def(
      "deform_conv(Tensor input, Tensor offset, Tensor? mask, Tensor weight, Tensor? bias, int[] stride, int[] "
      "padding, "
      "int[] dilation, int offset_groups, bool tf32, bool wgmma, Tensor(a!) output) -> ()");
  m.def("deform_conv_has_wgmma(Tensor input) -> bool");
  m.def(
      "deform_conv_backward(Tensor grad, Tensor input, Tensor offset, Tensor? mask, Tensor weight, int[] stride, "
      "int[] padding, int[] dilation, int offset_groups, bool tf32, Tensor(a!) grad_input, Tensor? scale, "
      "Tensor(b!) grad_offset, Tensor(c!) grad_mask) -> ()");
  m.def(
      "deform_conv_weight(Tensor grad, Tensor input, Tensor offset, Tensor? mask, int[] kernel_size, int[] stride, "
      "int[] padding, int[] dilation, int offset_groups, bool tf32, Tensor(a!) grad_weight) -> ()");
}

BKD_KERNELS(m) {
  m.impl("deform_conv", TORCH_BOX(&bkd::conv));
  m.impl("deform_conv_has_wgmma", TORCH_BOX(&bkd::conv_has_wgmma));
  m.impl("deform_conv_backward", TORCH_BOX(&bkd::conv_backward));
  m.impl("deform_conv_weight", TORCH_BOX(&bkd::conv_weight));
}
