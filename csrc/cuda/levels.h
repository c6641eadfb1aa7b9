// From lists of levels to pairs.
#pragma once

#include <algorithm>

#include "bindings.h"
#include "pairs.h"

namespace bkd {

// Level `level` with its students of the branches from `first` on, as many as one launch takes; students are given
// branch after branch. Channels may be more than the teacher's own, to fill chunks.
inline Pair pair_of(const Tensors& teacher, const Tensors& student, size_t level, size_t first) {
  const Tensor& t = teacher[level];
  Pair p{};
  p.images = static_cast<int>(t.size(0)), p.channels = static_cast<int>(t.size(1));
  p.pixels = static_cast<int>(t.size(2) * t.size(3));
  p.channels_first = t.is_contiguous();
  p.teacher = data(t);
  const size_t all = student.size() / teacher.size();
  p.branches = static_cast<int>(std::min<size_t>(kMostBranches, all - first));
  for (int b = 0; b < p.branches; ++b) p.student[b] = data(student[(first + b) * teacher.size() + level]);
  return p;
}

}  // namespace bkd
