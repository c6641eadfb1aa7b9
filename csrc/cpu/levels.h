// Levels of a teacher and its students, from torch's tensors to what the kernels take.
#pragma once

#include "../common/level_checks.h"
#include "dispatch.h"
#include "level.h"

namespace bkd {
namespace {

// Levels with pointers into the tensors; students are given branch after branch.
template <class T>
struct LevelTable {
  LevelTable(const Tensors& teacher, const Tensors& student, const std::vector<double>& weights)
      : branches(student.size() / teacher.size()), students(student.size()), factors(student.size()) {
    const int64_t count = teacher.size();
    for (int64_t l = 0; l < count; ++l) {
      for (int64_t b = 0; b < branches; ++b) {
        students[l * branches + b] = data<T>(student[b * count + l]);
        factors[l * branches + b] = weights.empty() ? T(1) : static_cast<T>(weights[b * count + l]);
      }
      const Tensor& t = teacher[l];
      const bool channels_first = t.is_contiguous();
      levels.push_back({t.size(1), t.size(2), t.size(3), channels_first ? t.size(2) * t.size(3) : 1,
                        channels_first ? 1 : t.size(1), data<T>(t), &students[l * branches], &factors[l * branches]});
    }
  }
  int64_t branches;
  std::vector<const T*> students;
  std::vector<T> factors;
  std::vector<Level<T>> levels;
};

// One gradient for each of the levels, laid out as it is, or without elements.
inline void check_gradients(const Checks& check, const char* name, const Tensors& gradients, const Tensors& levels) {
  check.length(name, gradients.size(), levels.size());
  for (size_t i = 0; i < gradients.size(); ++i)
    check.result(std::string(name) + "[" + std::to_string(i) + "]", gradients[i], sizes_of(levels[i]),
                 layout_of(levels[i]));
}

}  // namespace
}  // namespace bkd
