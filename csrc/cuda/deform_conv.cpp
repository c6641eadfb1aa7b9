#include "deform_conv.h"

#include "bindings.h"
#include "deform_gather.h"

namespace bkd {
namespace {

// Channels first, or last where that is how the tensor lies.
void set_strides(const Tensor& tensor, int64_t& image, int& channel, int& pixel) {
  const int64_t channels = tensor.size(1), pixels = tensor.size(2) * tensor.size(3);
  image = channels * pixels;
  channel = static_cast<int>(tensor.is_contiguous() ? pixels : 1);
  pixel = static_cast<int>(tensor.is_contiguous() ? 1 : channels);
}

Sampling sampling(const Tensor& offset, const std::optional<Tensor>& mask, int64_t height, int64_t width,
                  const Integers& kernel, const Integers& stride, const Integers& padding, const Integers& dilation) {
  Sampling s{};
  s.offset = data(offset);
  s.float_offset = is_float(offset);
  set_strides(offset, s.offset_image, s.offset_channel, s.offset_pixel);
  if (mask) {
    s.mask = data(*mask);
    s.float_mask = is_float(*mask);
    set_strides(*mask, s.mask_image, s.mask_channel, s.mask_pixel);
  }
  s.height = static_cast<int>(height), s.width = static_cast<int>(width);
  s.out_height = static_cast<int>(offset.size(2)), s.out_width = static_cast<int>(offset.size(3));
  s.taps = static_cast<int>(kernel[0] * kernel[1]), s.kernel_width = static_cast<int>(kernel[1]);
  s.stride_y = static_cast<int>(stride[0]), s.stride_x = static_cast<int>(stride[1]);
  s.padding_y = static_cast<int>(padding[0]), s.padding_x = static_cast<int>(padding[1]);
  s.dilation_y = static_cast<int>(dilation[0]), s.dilation_x = static_cast<int>(dilation[1]);
  return s;
}

// Whole numbers with a scale, or floats without.
Accumulator accumulator(const Tensor& tensor, const std::optional<Tensor>& scale) {
  if (!tensor.numel()) return {};
  if (scale) return {nullptr, data<unsigned long long>(tensor), data<float>(*scale)};
  return {data<float>(tensor), nullptr, nullptr};
}

DeformConv problem(const Tensor& input, const Tensor& offset, const std::optional<Tensor>& mask, int64_t outputs,
                   int64_t groups, const Integers& kernel, const Integers& stride, const Integers& padding,
                   const Integers& dilation, int64_t offset_groups) {
  DeformConv p{};
  p.sampling = sampling(offset, mask, input.size(2), input.size(3), kernel, stride, padding, dilation);
  p.pixels = static_cast<int>(offset.size(0)) * p.sampling.pixels();
  p.channels = static_cast<int>(input.size(1)), p.outputs = static_cast<int>(outputs);
  p.groups = static_cast<int>(groups), p.offset_groups = static_cast<int>(offset_groups);
  p.input = data(input);
  return p;
}

void conv(const Tensor& input, const Tensor& offset, const std::optional<Tensor>& mask, const Tensor& weight,
          const std::optional<Tensor>& bias, const Integers& stride, const Integers& padding, const Integers& dilation,
          int64_t offset_groups, bool tf32, const Tensor& output) {
  const Current current(input);
  DeformConv p = problem(input, offset, mask, weight.size(0), input.size(1) / weight.size(1),
                         {weight.size(2), weight.size(3)}, stride, padding, dilation, offset_groups);
  p.weight = data(weight);
  p.bias = data(bias);
  p.output = data(output);
  deform_conv(p, type_of(input), tf32, current.device);
}

void conv_backward(const Tensor& grad, const Tensor& input, const Tensor& offset, const std::optional<Tensor>& mask,
                   const Tensor& weight, const Integers& stride, const Integers& padding, const Integers& dilation,
                   int64_t offset_groups, bool tf32, const Tensor& grad_input, const std::optional<Tensor>& scale,
                   const Tensor& grad_offset, const Tensor& grad_mask) {
  const Current current(input);
  DeformConv p = problem(input, offset, mask, weight.size(0), input.size(1) / weight.size(1),
                         {weight.size(2), weight.size(3)}, stride, padding, dilation, offset_groups);
  p.weight = data(weight);
  p.grad = data(grad);
  p.grad_input = accumulator(grad_input, scale);
  p.grad_moves = {data<float>(grad_offset), data<float>(grad_mask)};
  deform_conv_backward(p, type_of(input), tf32, current.device);
}

void conv_weight(const Tensor& grad, const Tensor& input, const Tensor& offset, const std::optional<Tensor>& mask,
                 const Integers& kernel, const Integers& stride, const Integers& padding, const Integers& dilation,
                 int64_t offset_groups, bool tf32, const Tensor& grad_weight) {
  const Current current(input);  // grad_weight: (parts, outputs, taps, channels / groups)
  DeformConv p = problem(input, offset, mask, grad.size(1), input.size(1) / grad_weight.size(3), kernel, stride,
                         padding, dilation, offset_groups);
  p.grad = data(grad);
  p.grad_weight = data<float>(grad_weight);
  p.parts = static_cast<int>(grad_weight.size(0));
  deform_conv_weight(p, type_of(input), tf32, current.device);
}

DeformGather problem(const Tensor& projected, const Tensor& offset, const std::optional<Tensor>& mask,
                     const Integers& kernel, const Integers& stride, const Integers& padding,
                     const Integers& dilation) {
  DeformGather p{};
  p.sampling = sampling(offset, mask, projected.size(2), projected.size(3), kernel, stride, padding, dilation);
  p.pixels = static_cast<int>(offset.size(0)) * p.sampling.pixels();
  p.taps = static_cast<int>(offset.size(1)) / 2;
  p.channels = static_cast<int>(projected.size(1)) / p.taps;
  p.shared = projected.size(0) == 1;
  p.projected = data(projected);
  return p;
}

void gather(const Tensor& projected, const Tensor& offset, const std::optional<Tensor>& mask, const Integers& kernel,
            const Integers& stride, const Integers& padding, const Integers& dilation, const Tensor& output) {
  const Current current(projected);
  DeformGather p = problem(projected, offset, mask, kernel, stride, padding, dilation);
  p.output = data(output);
  deform_gather(p, type_of(projected), current.device);
}

void gather_backward(const Tensor& grad, const Tensor& projected, const Tensor& offset,
                     const std::optional<Tensor>& mask, const Integers& kernel, const Integers& stride,
                     const Integers& padding, const Integers& dilation, const Tensor& grad_projected,
                     const std::optional<Tensor>& scale, const Tensor& grad_offset, const Tensor& grad_mask) {
  const Current current(projected);
  DeformGather p = problem(projected, offset, mask, kernel, stride, padding, dilation);
  p.grad = data(grad);
  p.grad_projected = accumulator(grad_projected, scale);
  p.grad_moves = {data<float>(grad_offset), data<float>(grad_mask)};
  deform_gather_backward(p, type_of(projected), current.device);
}

}  // namespace
}  // namespace bkd

BKD_DEFINITIONS(m) {
  m.def(
      "deform_conv(Tensor input, Tensor offset, Tensor? mask, Tensor weight, Tensor? bias, int[] stride, int[] "
      "padding, "
      "int[] dilation, int offset_groups, bool tf32, Tensor(a!) output) -> ()");
  m.def(
      "deform_conv_backward(Tensor grad, Tensor input, Tensor offset, Tensor? mask, Tensor weight, int[] stride, "
      "int[] padding, int[] dilation, int offset_groups, bool tf32, Tensor(a!) grad_input, Tensor? scale, "
      "Tensor(b!) grad_offset, Tensor(c!) grad_mask) -> ()");
  m.def(
      "deform_conv_weight(Tensor grad, Tensor input, Tensor offset, Tensor? mask, int[] kernel_size, int[] stride, "
      "int[] padding, int[] dilation, int offset_groups, bool tf32, Tensor(a!) grad_weight) -> ()");
  m.def(
      "deform_gather(Tensor projected, Tensor offset, Tensor? mask, int[] kernel_size, int[] stride, int[] padding, "
      "int[] dilation, Tensor(a!) output) -> ()");
  m.def(
      "deform_gather_backward(Tensor grad, Tensor projected, Tensor offset, Tensor? mask, int[] kernel_size, int[] "
      "stride, "
      "int[] padding, int[] dilation, Tensor(a!) grad_projected, Tensor? scale, Tensor(b!) grad_offset, "
      "Tensor(c!) grad_mask) -> ()");
}

BKD_KERNELS(m) {
  m.impl("deform_conv", TORCH_BOX(&bkd::conv));
  m.impl("deform_conv_backward", TORCH_BOX(&bkd::conv_backward));
  m.impl("deform_conv_weight", TORCH_BOX(&bkd::conv_weight));
  m.impl("deform_gather", TORCH_BOX(&bkd::gather));
  m.impl("deform_gather_backward", TORCH_BOX(&bkd::gather_backward));
}
