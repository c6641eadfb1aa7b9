// The distillation loss: the arguments of its kernels.
#pragma once

#include "level.h"

namespace bkd {

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

BKD_DECLARE_KERNEL(distillation_loss, DistillationLoss)
BKD_DECLARE_KERNEL(distillation_loss_backward, DistillationLoss)

}  // namespace bkd
