// Modulated deformable sampling of projected features.
#include "deform_gather.h"

#include "bindings.h"
#include "convolution.h"

namespace bkd {
namespace {

Checks check_arguments(const char* function, const Tensor& projected, const Tensor& offset,
                       const std::optional<Tensor>& mask, const Geometry& geometry, const char* output_name,
                       const Tensor& output) {
  const Checks check(function, "projected", projected, KERNEL_TYPES);
  check.tensor("projected", projected, {ANY, ANY, ANY, ANY}, Layout::channels_last);
  check.not_empty("projected", projected, 1), check.aligned("projected", projected);
  check_dimensions(function, "offset", offset, 4);
  check.length("kernel_size", geometry.kernel.size(), 2);
  const int64_t batch = offset.size(0), taps = offset.size(1) / 2, tile = geometry.kernel[0] * geometry.kernel[1];
  check.that(projected.size(0) == 1 || projected.size(0) == batch, "projected",
             "has batch " + std::to_string(projected.size(0)), "1 or " + std::to_string(batch));
  check.that(taps > 0 && tile > 0 && taps % tile == 0 && projected.size(1) % taps == 0, "offset",
             "has " + std::to_string(offset.size(1)) + " channels",
             "a multiple of twice the kernel's taps, half of which divides the channels of projected");
  check_sampling(check, projected, batch, offset, mask, geometry, taps / tile);
  check.chunks("projected", projected, projected.size(1) / taps);
  check.tensor(output_name, output, {batch, projected.size(1) / taps, offset.size(2), offset.size(3)},
               Layout::channels_last);
  check.aligned(output_name, output);
  return check;
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
  check_arguments("deform_gather", projected, offset, mask, {kernel, stride, padding, dilation}, "output", output);
  const Current current(projected);
  DeformGather p = problem(projected, offset, mask, kernel, stride, padding, dilation);
  p.output = data(output);
  deform_gather(p, type_of(projected), current.device);
}

void gather_backward(const Tensor& grad, const Tensor& projected, const Tensor& offset,
                     const std::optional<Tensor>& mask, const Integers& kernel, const Integers& stride,
                     const Integers& padding, const Integers& dilation, const Tensor& grad_projected,
                     const std::optional<Tensor>& scale, const Tensor& grad_offset, const Tensor& grad_mask) {
  const Checks check = check_arguments("deform_gather_backward", projected, offset, mask,
                                       {kernel, stride, padding, dilation}, "grad", grad);
  check_sampling_gradients(check, "grad_projected", grad_projected, projected, scale, grad_offset, offset, grad_mask,
                           mask);
  const Current current(projected);
  DeformGather p = problem(projected, offset, mask, kernel, stride, padding, dilation);
  p.grad = data(grad);
  p.grad_projected = accumulator(grad_projected, scale);
  p.grad_sampling = {data<float>(grad_offset), data<float>(grad_mask)};
  deform_gather_backward(p, type_of(projected), current.device);
}

}  // namespace
}  // namespace bkd

BKD_DEFINITIONS(m) {
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
  m.impl("deform_gather", TORCH_BOX(&bkd::gather));
  m.impl("deform_gather_backward", TORCH_BOX(&bkd::gather_backward));
}
