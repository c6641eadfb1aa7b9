// Modulated deformable convolution of groups of few channels.
#include "deform_conv_few.h"

#include "bindings.h"
#include "convolution.h"

namespace bkd {
namespace {

void conv(const Tensor& input, const Tensor& offset, const std::optional<Tensor>& mask, const Tensor& weight,
          const std::optional<Tensor>& bias, const Integers& kernel, const Integers& stride, const Integers& padding,
          const Integers& dilation, int64_t offset_groups, int64_t groups, const Tensor& output) {
  const Checks check("deform_conv_few", "input", input, KERNEL_TYPES);
  check.tensor("input", input, {ANY, ANY, ANY, ANY}, Layout::channels_last);
  check.not_empty("input", input, 1), check.aligned("input", input);
  const int64_t channels = input.size(1), chunks = channels / kFewChannels;
  check.in_range("offset_groups", offset_groups, 1, channels);
  check.that(channels % (offset_groups * kFewChannels) == 0, "input", "has " + std::to_string(channels) + " channels",
             "a multiple of " + std::to_string(offset_groups * kFewChannels));
  check_sampling(check, input, input.size(0), offset, mask, {kernel, stride, padding, dilation}, offset_groups);
  check_dimensions("deform_conv_few", "weight", weight, 5);
  const int64_t width = weight.size(4), taps = kernel[0] * kernel[1];
  check.that(width == 1 || width == 2 || width == 4 || width == 8, "weight",
             "has groups of " + std::to_string(width) + " channels", "1, 2, 4 or 8");
  check.tensor("weight", weight, {ANY, taps, chunks, kFewChannels, width});
  check.not_empty("weight", weight, 0), check.aligned("weight", weight);
  check.tensor("output", output, {input.size(0), ANY, offset.size(2), offset.size(3)}, Layout::channels_last);
  const int64_t outputs = output.size(1);
  check.in_range("groups", groups, 1, outputs);
  check.that(groups % offset_groups == 0 && outputs % groups == 0 && groups * width <= channels &&
                 outputs <= groups * width * weight.size(0),
             "output", "has " + std::to_string(outputs) + " channels", "what groups, offset groups and weight allow");
  check.tensor("bias", bias, {outputs});
  const Current current(input);
  DeformConvFew p{};
  p.sampling = sampling(offset, mask, input.size(2), input.size(3), kernel, stride, padding, dilation);
  p.pixels = static_cast<int>(offset.size(0)) * p.sampling.pixels();
  p.outputs = static_cast<int>(outputs), p.group_outputs = static_cast<int>(outputs / groups);
  p.chunks = static_cast<int>(chunks), p.offset_chunks = static_cast<int>(chunks / offset_groups);
  p.own_groups = static_cast<int>(groups / offset_groups);
  p.width = static_cast<int>(width), p.rounds = static_cast<int>(weight.size(0));
  p.input_line = static_cast<uint32_t>(channels * static_cast<int64_t>(input.element_size()));
  p.input = data(input), p.weight = data(weight), p.bias = data(bias), p.output = data(output);
  const auto aligned = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  p.whole = p.group_outputs == width && groups * width == channels && aligned(p.bias) && aligned(p.output);
  deform_conv_few(p, type_of(input), current.device);
}

}  // namespace
}  // namespace bkd

BKD_DEFINITIONS(m) {
  m.def(
      "deform_conv_few(Tensor input, Tensor offset, Tensor? mask, Tensor weight, Tensor? bias, int[] kernel_size, "
      "int[] stride, int[] padding, int[] dilation, int offset_groups, int groups, Tensor(a!) output) -> ()");
}

BKD_KERNELS(m) { m.impl("deform_conv_few", TORCH_BOX(&bkd::conv)); }
