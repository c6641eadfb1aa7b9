// A level of a teacher and of students, and gradients from sums over its channels: what the anomaly map and the
// distillation loss share.
#pragma once

#include "launch.h"

namespace bkd {

constexpr int kMostBranches = 4;  // that one launch takes

// One level; all tensors lie alike, channels first (image, channels, pixels) or last, then in whole chunks of 16 bytes.
struct Pair {
  int images, channels, pixels;  // of an image
  bool channels_first;
  const void* teacher;
  const void* student[kMostBranches];
  int branches;

  BKD_BOTH int64_t vectors() const { return int64_t{images} * pixels; }
};

// By branch and vector (a pixel, or a whole image): (branch, {dot product, squared norm of teacher, of student},
// vector).
struct PairGradient {
  Pair pair;
  bool by_image;
  const float* statistics;
  int64_t vectors;
  const float* grad;  // by the distance of each vector, or one number for all
  bool one_grad;
  float direction[kMostBranches],
      value[kMostBranches];  // factors of 1 - cos, and of the squared difference of a channel
  void* grad_teacher;        // null where not needed
  void* grad_student[kMostBranches];
  bool add;  // to what grad_teacher holds
};

void pair_gradient(const PairGradient& p, Type type, const Device& device);

}  // namespace bkd
