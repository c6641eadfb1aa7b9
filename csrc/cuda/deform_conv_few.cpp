// Modulated deformable convolution of groups of few channels.
#include "deform_conv_few.h"

#include "bindings.h"
#include "convolution.h"

namespace bkd {
namespace {

// width: channels of a group. rounds: of outputs.
DeformConvFew problem(const Checks& check, const Tensor& input, const Tensor& offset, const std::optional<Tensor>& mask,
                      const Geometry& geometry, int64_t offset_groups, int64_t width, int64_t rounds) {
  check.tensor("input", input, {ANY, ANY, ANY, ANY}, Layout::channels_last);
  check.not_empty("input", input, 1), check.aligned("input", input);
  const int64_t channels = input.size(1);
  check.in_range("offset_groups", offset_groups, 1, channels);
  check.that(channels % (offset_groups * kFewChannels) == 0, "input", "has " + std::to_string(channels) + " channels",
             "a multiple of " + std::to_string(offset_groups * kFewChannels));
  check_sampling(check, input, input.size(0), offset, mask, geometry, offset_groups);
  check.that(width == 1 || width == 2 || width == 4 || width == 8, "weight",
             "has groups of " + std::to_string(width) + " channels", "1, 2, 4 or 8");
  check.in_range("the number of rounds", rounds, 1, MAX_INT);
  DeformConvFew p{};
  p.sampling = sampling(offset, mask, input.size(2), input.size(3), geometry.kernel, geometry.stride, geometry.padding,
                        geometry.dilation);
  p.pixels = static_cast<int>(offset.size(0)) * p.sampling.pixels();
  p.channels = static_cast<int>(channels), p.offset_groups = static_cast<int>(offset_groups);
  p.chunks = p.channels / kFewChannels, p.offset_chunks = p.chunks / p.offset_groups;
  p.width = static_cast<int>(width), p.rounds = static_cast<int>(rounds);
  p.input_line = static_cast<uint32_t>(channels * static_cast<int64_t>(input.element_size()));
  p.input = data(input);
  return p;
}

void check_weight(const Checks& check, const Tensor& weight, const Tensor& input, const Integers& kernel) {
  check.tensor("weight", weight, {ANY, kernel[0] * kernel[1], ANY, input.size(1)});
  check.not_empty("weight", weight, 0), check.aligned("weight", weight);
}

// grad (image, rounds x channels, H', W').
void check_grad(const Checks& check, const Tensor& grad, const Tensor& input, const Tensor& offset, int64_t rounds) {
  check.tensor("grad", grad, {input.size(0), rounds * input.size(1), offset.size(2), offset.size(3)},
               Layout::channels_last);
  check.aligned("grad", grad);
}

void conv(const Tensor& input, const Tensor& offset, const std::optional<Tensor>& mask, const Tensor& weight,
          const std::optional<Tensor>& bias, const Integers& kernel, const Integers& stride, const Integers& padding,
          const Integers& dilation, int64_t offset_groups, int64_t groups, const Tensor& output) {
  check_dimensions("deform_conv_few", "weight", weight, 4);
  const Checks check("deform_conv_few", "input", input, KERNEL_TYPES);
  DeformConvFew p = problem(check, input, offset, mask, {kernel, stride, padding, dilation}, offset_groups,
                            weight.size(2), weight.size(0));
  check_weight(check, weight, input, kernel);
  check.tensor("output", output, {input.size(0), ANY, offset.size(2), offset.size(3)}, Layout::channels_last);
  const int64_t outputs = output.size(1);
  check.in_range("groups", groups, 1, outputs);
  check.that(groups % offset_groups == 0 && outputs % groups == 0 && groups * p.width <= p.channels &&
                 outputs <= groups * p.width * p.rounds,
             "output", "has " + std::to_string(outputs) + " channels", "what groups, offset groups and weight allow");
  check.tensor("bias", bias, {outputs});
  const Current current(input);
  p.outputs = static_cast<int>(outputs), p.group_outputs = static_cast<int>(outputs / groups);
  p.own_groups = static_cast<int>(groups / offset_groups);
  p.weight = data(weight), p.bias = data(bias), p.output = data(output);
  const auto aligned = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  p.whole = p.group_outputs == p.width && groups * p.width == p.channels && aligned(p.bias) && aligned(p.output);
  deform_conv_few(p, type_of(input), current.device);
}

void conv_backward(const Tensor& grad, const Tensor& input, const Tensor& offset, const std::optional<Tensor>& mask,
                   const Tensor& weight, const Integers& kernel, const Integers& stride, const Integers& padding,
                   const Integers& dilation, int64_t offset_groups, int64_t group_channels, const Tensor& grad_input,
                   const std::optional<Tensor>& scale, const Tensor& grad_offset, const Tensor& grad_mask) {
  check_dimensions("deform_conv_few_backward", "weight", weight, 4);
  const Checks check("deform_conv_few_backward", "input", input, KERNEL_TYPES);
  DeformConvFew p = problem(check, input, offset, mask, {kernel, stride, padding, dilation}, offset_groups,
                            weight.size(2), weight.size(0));
  check_weight(check, weight, input, kernel);
  check_grad(check, grad, input, offset, p.rounds);
  check.in_range("group_channels", group_channels, 1, p.width);
  check_sampling_gradients(check, "grad_input", grad_input, input, scale, grad_offset, offset, grad_mask, mask);
  const Current current(input);
  p.weight = data(weight), p.grad = data(grad), p.group_channels = static_cast<int>(group_channels);
  p.grad_input = accumulator(grad_input, scale);
  p.grad_sampling = {data<float>(grad_offset), data<float>(grad_mask)};
  deform_conv_few_backward(p, type_of(input), current.device);
}

void conv_weight(const Tensor& grad, const Tensor& input, const Tensor& offset, const std::optional<Tensor>& mask,
                 const Integers& kernel, const Integers& stride, const Integers& padding, const Integers& dilation,
                 int64_t offset_groups, const Tensor& grad_weight) {
  check_dimensions("deform_conv_few_weight", "grad_weight", grad_weight, 5);
  const Checks check("deform_conv_few_weight", "input", input, KERNEL_TYPES);
  DeformConvFew p = problem(check, input, offset, mask, {kernel, stride, padding, dilation}, offset_groups,
                            grad_weight.size(3), grad_weight.size(1));
  check.tensor("grad_weight", grad_weight, ScalarType::Float,
               {ANY, p.rounds, kernel[0] * kernel[1], p.width, input.size(1)});
  check_grad(check, grad, input, offset, p.rounds);
  const Current current(input);
  p.grad = data(grad), p.grad_weight = data<float>(grad_weight);
  p.parts = static_cast<int>(grad_weight.size(0));
  deform_conv_few_weight(p, type_of(input), current.device);
}

}  // namespace
}  // namespace bkd

BKD_DEFINITIONS(m) {
  m.def(
      "deform_conv_few(Tensor input, Tensor offset, Tensor? mask, Tensor weight, Tensor? bias, int[] kernel_size, "
      "int[] stride, int[] padding, int[] dilation, int offset_groups, int groups, Tensor(a!) output) -> ()");
  m.def(
      "deform_conv_few_backward(Tensor grad, Tensor input, Tensor offset, Tensor? mask, Tensor weight, int[] "
      "kernel_size, int[] stride, int[] padding, int[] dilation, int offset_groups, int group_channels, "
      "Tensor(a!) grad_input, Tensor? scale, Tensor(b!) grad_offset, Tensor(c!) grad_mask) -> ()");
  m.def(
      "deform_conv_few_weight(Tensor grad, Tensor input, Tensor offset, Tensor? mask, int[] kernel_size, int[] stride, "
      "int[] padding, int[] dilation, int offset_groups, Tensor(a!) grad_weight) -> ()");
}

BKD_KERNELS(m) {
  m.impl("deform_conv_few", TORCH_BOX(&bkd::conv));
  m.impl("deform_conv_few_backward", TORCH_BOX(&bkd::conv_backward));
  m.impl("deform_conv_few_weight", TORCH_BOX(&bkd::conv_weight));
}
