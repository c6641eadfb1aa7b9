// A level of a teacher and its students, and gradients of its distances: shared by the anomaly map and the distillation
// loss.
#pragma once

#include "launch.h"

namespace bkd {

constexpr int kMaxBranches = 4;  // per launch

// One level. All tensors have one layout: channels-first (image, channels, pixels), or channels-last in whole 16-byte
// chunks.
struct Pair {
  int images, channels, pixels;  // of an image
  bool channels_first;
  const void* teacher;
  const void* student[kMaxBranches];
  int branches;

  BKD_HOST_DEVICE int64_t vectors() const { return int64_t{images} * pixels; }
};

// A vector is a pixel or a whole image. statistics: (branch, {dot product, squared norm of teacher, of student},
// vector).
struct PairGradient {
  Pair pair;
  bool by_image;
  const float* statistics;
  int64_t vectors;
  const float* grad;  // with respect to each vector's distance, or one value for all
  bool one_grad;
  float direction[kMaxBranches],
      value[kMaxBranches];  // factors of 1 - cos, and of the squared difference of a channel
  void* grad_teacher;       // null where not needed
  void* grad_student[kMaxBranches];
  bool add;  // accumulate into grad_teacher
};

void pair_gradient(const PairGradient& p, Type type, const Device& device);

}  // namespace bkd
