// The CPU kernels as one table of functions, filled once for each instruction set.
#pragma once

#include "kernel.h"

namespace bkd {

using Queue = TaskQueue;

// Modulated deformable convolution. Images are channels-last, (N, H, W, C).
// offset (N, 2 G K, Ho, Wo) and mask (N, G K, Ho, Wo) or null, contiguous.
template <class T>
struct DeformConv {
  Parallel parallel;
  int64_t threads;
  int64_t batch, channels, height, width;
  int64_t outputs, out_height, out_width, groups, offset_groups;
  int64_t kernel[2], stride[2], padding[2], dilation[2];
  const T* input;
  const T* offset;
  const T* mask;
  const T* weight;  // (O, C / groups, kh, kw), contiguous
  const T* bias;    // (O) or null
  // The output, and its gradient in the backward: strides of channels and pixels, one of which is 1.
  T* output;
  const T* grad;
  int64_t output_channel_stride, output_pixel_stride;
  // The backward's results; null where they are not needed.
  T* grad_input;
  T* grad_offset;
  T* grad_mask;
  T* grad_weight;

  int64_t taps() const { return kernel[0] * kernel[1]; }
  int64_t slots() const { return offset_groups * taps(); }  // positions that a pixel samples
  int64_t pixels() const { return out_height * out_width; }
  const T* image(int64_t n) const { return input + n * height * width * channels; }
};

// Sampling of an input that is a product with the weights already: projected (B, H, W, T, C), output (N, Ho, Wo, C).
template <class T>
struct DeformGather {
  Parallel parallel;
  int64_t threads;
  int64_t batch, shared, taps, channels, height, width, out_height, out_width;
  int64_t kernel[2], stride[2], padding[2], dilation[2];
  const T* projected;
  const T* offset;
  const T* mask;
  T* output;
  const T* grad;  // (N, Ho, Wo, C)
  T* grad_projected;
  T* grad_offset;
  T* grad_mask;

  int64_t slots() const { return taps; }  // positions that a pixel samples
  int64_t pixels() const { return out_height * out_width; }
  const T* image(int64_t n) const { return projected + (shared ? 0 : n * height * width * taps * channels); }
};

// query, output (R, C); memory (I, C); contiguous.
template <class T>
struct MemoryAttention {
  Parallel parallel;
  int64_t rows, items, channels;
  T threshold, temperature;
  bool renormalize;
  const T* query;
  const T* memory;
  T* output;
  const T* grad;
  T* grad_query;
  T* grad_memory;
};

// One level of features: element (n, c, pixel) at n * image + c * channel_stride + pixel * pixel_stride,
// one of the two strides being 1.
template <class T>
struct Level {
  int64_t channels, height, width, channel_stride, pixel_stride;
  const T* teacher;
  const T* const* student;  // one for each branch
  const T* weight;          // of each branch
  int64_t pixels() const { return height * width; }
  int64_t image() const { return channels * height * width; }
};

template <class T>
struct AnomalyMap {
  Parallel parallel;
  int64_t batch, levels, branches, height, width;
  const Level<T>* level;
  bool product, align_corners;
  T sigma, value_share;
  T* distances;  // (N, H_l, W_l) of all levels, one after another
  T* map;        // (N, H, W)
  // The backward: the gradient by the distances, laid out as they are, and results for teacher and students.
  const T* grad;
  T* const* grad_teacher;  // one for each level, null where not needed
  T* const* grad_student;  // levels of one branch after those of another
};

template <class T>
struct DistillationLoss {
  Parallel parallel;
  int64_t batch, levels;
  const Level<T>* level;
  bool by_pixel;
  T value_weight;
  T* statistics;  // per level: dot, |t|^2, |s|^2 of every image or pixel
  T* loss;
  T grad;
  T* const* grad_teacher;
  T* const* grad_student;
};

// What a support's numbers are: the query's type, or 16 bits of a float.
enum class Numbers { Same, Half, BFloat };

struct Move {
  int64_t y, x;
};

// query (N, H, W, C), support (P, H, W, C), shot (N, k) of 0 to P - 1; distance (N, k, H, W), displacement
// (N, k, 2, H, W).
template <class T>
struct LocalMatch {
  Parallel parallel;
  int64_t threads;
  int64_t batch, shots, channels, height, width, radius;
  const Move* moves;  // of the window, in the order in which equal distances are preferred
  const T* query;
  const char* support;
  Numbers numbers;  // of the support
  int64_t bytes;    // of one of them
  const int64_t* shot;
  T* distance;
  T* displacement;

  // A pixel of the image that a pair of a query and a shot is about.
  const char* image(int64_t pair, int64_t pixel) const {
    return support + (shot[pair] * height * width + pixel) * channels * bytes;
  }
};

template <class T>
struct Kernels {
  void (*deform_conv)(const DeformConv<T>&);
  void (*deform_conv_backward)(const DeformConv<T>&);
  void (*deform_gather)(const DeformGather<T>&);
  void (*deform_gather_backward)(const DeformGather<T>&);
  void (*memory_attention)(const MemoryAttention<T>&);
  void (*memory_attention_backward)(const MemoryAttention<T>&);
  void (*distances)(const AnomalyMap<T>&);
  void (*anomaly_map)(const AnomalyMap<T>&);
  void (*distances_backward)(const AnomalyMap<T>&);
  void (*distillation_loss)(const DistillationLoss<T>&);
  void (*distillation_loss_backward)(const DistillationLoss<T>&);
  void (*local_match)(const LocalMatch<T>&);
};

struct Tier {
  const char* name;
  Kernels<float> single;
  Kernels<double> twice;
};

Tier portable_tier();
#if defined(__x86_64__)
Tier avx2_tier();
Tier avx512_tier();
#endif

}  // namespace bkd
