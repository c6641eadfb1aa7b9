// Sampling positions of a deformable convolution (Eq. 2 and 5): neighbours and bilinear weights per output pixel and
// tap.
#pragma once

#include "../common/bilinear.h"
#include "instructions.cuh"
#include "sampling.h"

namespace bkd {
namespace {

// Coordinates of an output pixel.
struct OutputPixel {
  int image, pixel, y, x;
};
__device__ __forceinline__ OutputPixel output_pixel(const Sampling& s, int index) {
  const int image = index / s.pixels(), pixel = index - image * s.pixels();
  const int y = pixel / s.out_width;
  return {image, pixel, y, pixel - y * s.out_width};
}

template <class T>
__device__ __forceinline__ Corners<float> corners_at(const Sampling& s, const OutputPixel& out, int group, int tap) {
  const int64_t channel = 2 * (group * s.taps + tap);
  const int64_t at = out.image * s.offset_image + channel * s.offset_channel + int64_t{out.pixel} * s.offset_pixel;
  const float offset_y = load_either<T>(s.offset, at, s.float_offset);
  const float offset_x = load_either<T>(s.offset, at + s.offset_channel, s.float_offset);
  const int down = tap / s.kernel_width, right = tap - down * s.kernel_width;
  const float y = static_cast<float>(out.y * s.stride_y - s.padding_y + down * s.dilation_y) + offset_y;
  const float x = static_cast<float>(out.x * s.stride_x - s.padding_x + right * s.dilation_x) + offset_x;
  return corners(y, x, s.height, s.width);
}

template <class T>
__device__ __forceinline__ float mask_at(const Sampling& s, const OutputPixel& out, int group, int tap) {
  if (!s.mask) return 1;
  const int64_t channel = group * s.taps + tap;
  const int64_t at = out.image * s.mask_image + channel * s.mask_channel + int64_t{out.pixel} * s.mask_pixel;
  return load_either<T>(s.mask, at, s.float_mask);
}

// Outside the image: kOutside, which reads as zero even where border pixels are Inf or NaN.
__device__ __forceinline__ uint32_t pixel_from(uint32_t base, int pixel) { return pixel < 0 ? kOutside : base + pixel; }

// For each output pixel of a tile and one tap: the four neighbours, and their bilinear weights times the mask. W: the
// type of a weight; one of 16 bits is there as a pair.
template <int kPixels, class W = float>
struct Neighbors {
  static constexpr bool kPaired = sizeof(W) == 2;
  using Weight = std::conditional_t<kPaired, uint4, float4>;
  uint4 pixel[kPixels];  // index over all images, or kOutside
  Weight weight[kPixels];

  // Compute entry `index` for output pixel `output`; not `valid` means no neighbours. All weights are times `scale`.
  template <class T>
  __device__ __forceinline__ void compute(int index, const Sampling& s, int output, bool valid, int group, int tap,
                                          bool shared_input = false, float scale = 1) {
    uint4 pixels = make_uint4(kOutside, kOutside, kOutside, kOutside);
    float4 weights = make_float4(0, 0, 0, 0);
    if (valid) {
      const OutputPixel out = output_pixel(s, output);
      const Corners<float> c = corners_at<T>(s, out, group, tap);
      const float mask = mask_at<T>(s, out, group, tap) * scale;
      const uint32_t base = shared_input ? 0 : out.image * s.height * s.width;
      pixels = make_uint4(pixel_from(base, c.pixel[0]), pixel_from(base, c.pixel[1]), pixel_from(base, c.pixel[2]),
                          pixel_from(base, c.pixel[3]));
      weights = make_float4(c.weight[0] * mask, c.weight[1] * mask, c.weight[2] * mask, c.weight[3] * mask);
    }
    store_shared(&pixel[index], pixels);
    if constexpr (kPaired) {
      store_shared(&weight[index], make_uint4(equal_pair<W>(weights.x), equal_pair<W>(weights.y),
                                              equal_pair<W>(weights.z), equal_pair<W>(weights.w)));
    } else {
      store_shared(&weight[index], weights);
    }
  }
};

// Values of the four neighbours for 16 bytes of channels, held in registers.
template <class T>
struct CornerValues {
  Pack<T> value[4];

  // input: the channels of pixel 0. line: bytes from one pixel to the next. Not `valid`: zeros. kReuse: as of
  // load_indexed.
  template <bool kReuse = false>
  __device__ __forceinline__ void fetch(const T* input, const uint4& pixel, uint32_t line, bool valid = true) {
    const uint32_t index[4] = {pixel.x, pixel.y, pixel.z, pixel.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) load_indexed<kReuse>(value[i], input, index[i], line, valid);
  }
  // Interpolate elements 2 i and 2 i + 1.
  __device__ __forceinline__ float2 sum(int i, const float4& weight) const {
    const float2 a = value[0].pair(i), b = value[1].pair(i), c = value[2].pair(i), d = value[3].pair(i);
    return make_float2(weight.x * a.x + weight.y * b.x + weight.z * c.x + weight.w * d.x,
                       weight.x * a.y + weight.y * b.y + weight.z * c.y + weight.w * d.y);
  }
  // Interpolate all elements in their own type, two at a time.
  template <bool>
  __device__ __forceinline__ Pack<T> sums(const uint4& weight) const {
    Pack<T> result;
#pragma unroll
    for (int i = 0; i < Pack<T>::kCount / 2; ++i) {
      uint32_t sum = multiply_add<T>(value[0].word(i), weight.x, 0);
      sum = multiply_add<T>(value[1].word(i), weight.y, sum);
      sum = multiply_add<T>(value[2].word(i), weight.z, sum);
      result.set_word(i, multiply_add<T>(value[3].word(i), weight.w, sum));
    }
    return result;
  }
  // Interpolate all elements; round to TF32 for tensor cores if kTf32.
  template <bool kTf32>
  __device__ __forceinline__ Pack<T> sums(const float4& weight) const {
    Pack<T> result;
#pragma unroll
    for (int i = 0; i < Pack<T>::kCount / 2; ++i) {
      float2 x = sum(i, weight);
      if constexpr (kTf32 && sizeof(T) == 4) x = make_float2(rounded_to_tf32(x.x), rounded_to_tf32(x.y));
      result.set_pair(i, x);
    }
    return result;
  }
};

}  // namespace
}  // namespace bkd
