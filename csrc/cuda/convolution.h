// Bindings that both deformable operators share: sampling positions and their gradients.
#pragma once

#include "../common/geometry.h"
#include "bindings.h"
#include "sampling.h"

namespace bkd {
namespace {

// For checks that come before a Checks object exists.
inline void check_dimensions(const char* function, const char* name, const Tensor& tensor, int64_t count) {
  if (tensor.dim() != count)
    throw std::invalid_argument("bkd_fast: " + std::string(function) + ": " + name + " has " +
                                std::to_string(tensor.dim()) + " dimensions, expected " + std::to_string(count));
}

// Offsets and mask have the image's type or float32. Pixel indices over all images fit in 32 bits.
inline void check_sampling(const Checks& check, const Tensor& image, int64_t batch, const Tensor& offset,
                           const std::optional<Tensor>& mask, const Geometry& geometry, int64_t groups) {
  const auto own = [&](const Tensor& tensor) {
    return tensor.scalar_type() == ScalarType::Float ? ScalarType::Float : check.type();
  };
  check.tensor("offset", offset, own(offset), {batch, ANY, ANY, ANY}, Layout::either);
  geometry.check(check, image, offset);
  const int64_t taps = groups * geometry.kernel[0] * geometry.kernel[1], pixels = offset.size(2) * offset.size(3);
  check.that(offset.size(1) == 2 * taps, "offset", "has " + std::to_string(offset.size(1)) + " channels",
             std::to_string(2 * taps));
  if (mask) check.tensor("mask", *mask, own(*mask), {batch, taps, offset.size(2), offset.size(3)}, Layout::either);
  check.in_range("the number of sampled pixels", batch * pixels, 0, MAX_INT);
  check.in_range("the number of pixels", image.size(0) * image.size(2) * image.size(3), 0, MAX_INT);
}

// A gradient without elements is not computed. With a scale, the gradient of the image is int64 fixed point.
inline void check_sampling_gradients(const Checks& check, const char* name, const Tensor& grad_image,
                                     const Tensor& image, const std::optional<Tensor>& scale, const Tensor& grad_offset,
                                     const Tensor& offset, const Tensor& grad_mask, const std::optional<Tensor>& mask) {
  if (grad_image.numel())
    check.tensor(name, grad_image, scale ? ScalarType::Long : ScalarType::Float, sizes_of(image),
                 Layout::channels_last);
  if (scale) check.tensor("scale", *scale, ScalarType::Float, {});
  if (grad_offset.numel()) check.tensor("grad_offset", grad_offset, ScalarType::Float, sizes_of(offset));
  check.that(mask || !grad_mask.numel(), "grad_mask", "has elements", "none, since there is no mask");
  if (grad_mask.numel()) check.tensor("grad_mask", grad_mask, ScalarType::Float, sizes_of(*mask));
}

// Strides of a tensor that is channels-first or channels-last.
inline void set_strides(const Tensor& tensor, int64_t& image, int& channel, int& pixel) {
  const int64_t channels = tensor.size(1), pixels = tensor.size(2) * tensor.size(3);
  image = channels * pixels;
  channel = static_cast<int>(tensor.is_contiguous() ? pixels : 1);
  pixel = static_cast<int>(tensor.is_contiguous() ? 1 : channels);
}

inline Sampling sampling(const Tensor& offset, const std::optional<Tensor>& mask, int64_t height, int64_t width,
                         const Integers& kernel, const Integers& stride, const Integers& padding,
                         const Integers& dilation) {
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

// Fixed point with a scale, float32 without.
inline Accumulator accumulator(const Tensor& tensor, const std::optional<Tensor>& scale) {
  if (!tensor.numel()) return {};
  if (scale) return {nullptr, data<unsigned long long>(tensor), data<float>(*scale)};
  return {data<float>(tensor), nullptr, nullptr};
}

}  // namespace
}  // namespace bkd
