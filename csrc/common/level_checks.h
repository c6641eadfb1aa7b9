// Checks of the levels of a teacher and its students.
#pragma once

#include "checks.h"

namespace bkd {
namespace {

// Levels (N, C, H, W) share N; only N may be 0. Student levels are branch-major and have the teacher's shapes and
// layouts. max_branches: max number of students.
inline Checks check_levels(const char* function, const Tensors& teacher, const Tensors& student,
                           std::initializer_list<ScalarType> types, size_t max_branches = MAX_INT) {
  if (teacher.empty()) throw std::invalid_argument("bkd_fast: " + std::string(function) + ": teacher has no levels");
  const Checks check(function, "teacher[0]", teacher[0], types);
  check.that(
      !student.empty() && student.size() % teacher.size() == 0 && student.size() / teacher.size() <= max_branches,
      "student", "has " + std::to_string(student.size()) + " levels",
      "a multiple of the teacher's " + std::to_string(teacher.size()));
  for (size_t i = 0; i < teacher.size(); ++i) {
    const std::string name = "teacher[" + std::to_string(i) + "]";
    check.tensor(name, teacher[i], {i ? teacher[0].size(0) : ANY, ANY, ANY, ANY}, Layout::either);
    check.not_empty(name, teacher[i], 1);
  }
  for (size_t i = 0; i < student.size(); ++i) {
    const Tensor& level = teacher[i % teacher.size()];
    check.tensor("student[" + std::to_string(i) + "]", student[i], sizes_of(level), layout_of(level));
  }
  return check;
}

}  // namespace
}  // namespace bkd
