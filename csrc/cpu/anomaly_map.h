// The anomaly map: the arguments of its kernels.
#pragma once

#include "level.h"

namespace bkd {

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

BKD_DECLARE_KERNEL(cosine_distances, AnomalyMap)
BKD_DECLARE_KERNEL(cosine_distances_backward, AnomalyMap)
BKD_DECLARE_KERNEL(anomaly_map, AnomalyMap)

}  // namespace bkd
