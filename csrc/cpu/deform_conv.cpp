#include "dispatch.h"

namespace bkd {
namespace {

template <class Problem>
void set_up(Problem& p, const Integers& kernel, const Integers& stride, const Integers& padding,
                  const Integers& dilation) {
  p.parallel = run_parallel;
  p.threads = torch::stable::get_num_threads();
  for (int axis = 0; axis < 2; ++axis) {
    p.kernel[axis] = kernel[axis];
    p.stride[axis] = stride[axis];
    p.padding[axis] = padding[axis];
    p.dilation[axis] = dilation[axis];
  }
}

template <class T>
DeformConv<T> problem(const Tensor& input, const Tensor& offset, const std::optional<Tensor>& mask, const Tensor& weight,
                      const Integers& stride, const Integers& padding, const Integers& dilation, const Tensor& output) {
  DeformConv<T> p{};
  set_up(p, {weight.size(2), weight.size(3)}, stride, padding, dilation);
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

void deform_conv(int64_t tier, const Tensor& input, const Tensor& offset, const std::optional<Tensor>& mask,
                 const Tensor& weight, const std::optional<Tensor>& bias, const Integers& stride,
                 const Integers& padding, const Integers& dilation, const Tensor& output) {
  dispatch(input, [&](auto zero) {
    using T = decltype(zero);
    DeformConv<T> p = problem<T>(input, offset, mask, weight, stride, padding, dilation, output);
    p.bias = data<T>(bias);
    p.output = data<T>(output);
    kernels_of<T>(tier).deform_conv(p);
  });
}

void deform_conv_backward(int64_t tier, const Tensor& grad, const Tensor& input, const Tensor& offset,
                          const std::optional<Tensor>& mask, const Tensor& weight, const Integers& stride,
                          const Integers& padding, const Integers& dilation, const Tensor& grad_input,
                          const Tensor& grad_offset, const Tensor& grad_mask, const Tensor& grad_weight) {
  dispatch(input, [&](auto zero) {
    using T = decltype(zero);
    DeformConv<T> p = problem<T>(input, offset, mask, weight, stride, padding, dilation, grad);
    p.grad = data<T>(grad);
    p.grad_input = data<T>(grad_input);
    p.grad_offset = data<T>(grad_offset);
    p.grad_mask = data<T>(grad_mask);
    p.grad_weight = data<T>(grad_weight);
    kernels_of<T>(tier).deform_conv_backward(p);
  });
}

template <class T>
DeformGather<T> problem(const Tensor& projected, const Tensor& offset, const std::optional<Tensor>& mask,
                        const Integers& kernel, const Integers& stride, const Integers& padding,
                        const Integers& dilation) {
  DeformGather<T> p{};
  set_up(p, kernel, stride, padding, dilation);
  p.batch = offset.size(0), p.shared = projected.size(0) == 1, p.taps = offset.size(1) / 2;
  p.channels = projected.size(1) / p.taps, p.height = projected.size(2), p.width = projected.size(3);
  p.out_height = offset.size(2), p.out_width = offset.size(3);
  p.projected = data<T>(projected);
  p.offset = data<T>(offset);
  p.mask = data<T>(mask);
  return p;
}

void deform_gather(int64_t tier, const Tensor& projected, const Tensor& offset, const std::optional<Tensor>& mask,
                   const Integers& kernel, const Integers& stride, const Integers& padding, const Integers& dilation,
                   const Tensor& output) {
  dispatch(projected, [&](auto zero) {
    using T = decltype(zero);
    DeformGather<T> p = problem<T>(projected, offset, mask, kernel, stride, padding, dilation);
    p.output = data<T>(output);
    kernels_of<T>(tier).deform_gather(p);
  });
}

void deform_gather_backward(int64_t tier, const Tensor& grad, const Tensor& projected, const Tensor& offset,
                            const std::optional<Tensor>& mask, const Integers& kernel, const Integers& stride,
                            const Integers& padding, const Integers& dilation, const Tensor& grad_projected,
                            const Tensor& grad_offset, const Tensor& grad_mask) {
  dispatch(projected, [&](auto zero) {
    using T = decltype(zero);
    DeformGather<T> p = problem<T>(projected, offset, mask, kernel, stride, padding, dilation);
    p.grad = data<T>(grad);
    p.grad_projected = data<T>(grad_projected);
    p.grad_offset = data<T>(grad_offset);
    p.grad_mask = data<T>(grad_mask);
    kernels_of<T>(tier).deform_gather_backward(p);
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
  m.def(
      "deform_gather(int tier, Tensor projected, Tensor offset, Tensor? mask, int[] kernel_size, int[] stride, "
      "int[] padding, int[] dilation, Tensor(a!) output) -> ()");
  m.def(
      "deform_gather_backward(int tier, Tensor grad, Tensor projected, Tensor offset, Tensor? mask, int[] kernel_size, "
      "int[] stride, int[] padding, int[] dilation, Tensor(a!) grad_projected, Tensor(b!) grad_offset, "
      "Tensor(c!) grad_mask) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(bkd_fast_native, CPU, m) {
  m.impl("deform_conv", TORCH_BOX(&bkd::deform_conv));
  m.impl("deform_conv_backward", TORCH_BOX(&bkd::deform_conv_backward));
  m.impl("deform_gather", TORCH_BOX(&bkd::deform_gather));
  m.impl("deform_gather_backward", TORCH_BOX(&bkd::deform_gather_backward));
}
