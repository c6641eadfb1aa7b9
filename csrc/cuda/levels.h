// Bindings that operators on teacher and student levels share.
#pragma once

#include <algorithm>

#include "../common/level_checks.h"
#include "bindings.h"
#include "pairs.h"

namespace bkd {

// channels: of each level, without padding to 16-byte chunks.
inline Checks check_pairs(const char* function, const Tensors& teacher, const Tensors& student,
                          const Integers& channels, size_t max_branches = MAX_INT) {
  const Checks check = check_levels(function, teacher, student, KERNEL_TYPES, max_branches);
  check.length("channels", channels.size(), teacher.size());
  for (size_t i = 0; i < teacher.size(); ++i) {
    const Tensor& level = teacher[i];
    const std::string name = "teacher[" + std::to_string(i) + "]";
    check.in_range("channels", channels[i], 1, level.size(1));
    check.in_range("the number of vectors", level.size(0) * level.size(2) * level.size(3), 0, MAX_INT);
    check.aligned(name, level);
    if (layout_of(level) == Layout::channels_last) check.chunks(name, level, level.size(1));
  }
  for (size_t i = 0; i < student.size(); ++i) check.aligned("student[" + std::to_string(i) + "]", student[i]);
  return check;
}

// One float32 tensor per level: results, or statistics saved for the backward pass.
inline void check_floats(const Checks& check, const std::string& name, const Tensors& tensors,
                         const std::vector<Integers>& sizes) {
  check.length(name, tensors.size(), sizes.size());
  for (size_t i = 0; i < tensors.size(); ++i)
    check.tensor(name + "[" + std::to_string(i) + "]", tensors[i], ScalarType::Float, sizes[i]);
}

// One gradient per level with the level's layout, or without elements.
inline void check_gradients(const Checks& check, const std::string& name, const Tensors& gradients,
                            const Tensors& levels) {
  check.length(name, gradients.size(), levels.size());
  for (size_t i = 0; i < gradients.size(); ++i) {
    const std::string own = name + "[" + std::to_string(i) + "]";
    check.result(own, gradients[i], sizes_of(levels[i]), layout_of(levels[i]));
    check.aligned(own, gradients[i]);
  }
}

// Level `level` with at most kMaxBranches students from branch `first` on. Students are ordered branch-major. Channels
// include padding to 16-byte chunks.
inline Pair pair_of(const Tensors& teacher, const Tensors& student, size_t level, size_t first) {
  const Tensor& t = teacher[level];
  Pair p{};
  p.images = static_cast<int>(t.size(0)), p.channels = static_cast<int>(t.size(1));
  p.pixels = static_cast<int>(t.size(2) * t.size(3));
  p.channels_first = t.is_contiguous();
  p.teacher = data(t);
  const size_t all = student.size() / teacher.size();
  p.branches = static_cast<int>(std::min<size_t>(kMaxBranches, all - first));
  for (int b = 0; b < p.branches; ++b) p.student[b] = data(student[(first + b) * teacher.size() + level]);
  return p;
}

}  // namespace bkd
