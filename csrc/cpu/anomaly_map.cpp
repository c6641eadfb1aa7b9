// The anomaly map.
#include "anomaly_map.h"

#include <algorithm>
#include <cmath>

#include "levels.h"

namespace bkd {
namespace {

template <class T>
AnomalyMap<T> problem(const LevelTable<T>& table, int64_t batch, double value_share) {
  AnomalyMap<T> p{};
  p.batch = batch, p.levels = table.levels.size(), p.branches = table.branches;
  p.level = table.levels.data();
  p.value_share = static_cast<T>(value_share);
  return p;
}

Checks check_arguments(const char* function, const Tensors& teacher, const Tensors& student,
                       const std::vector<double>& weights, double value_share) {
  const Checks check = check_levels(function, teacher, student, KERNEL_TYPES);
  check.length("weights", weights.size(), student.size());
  check.in_range("value_share", value_share, 0.0, 1.0);
  return check;
}

// Positions of all images and levels.
int64_t positions_of(const Tensors& teacher) {
  int64_t positions = 0;
  for (const Tensor& level : teacher) positions += level.size(0) * level.size(2) * level.size(3);
  return positions;
}

// To a power; few enough numbers, one a feature pixel, for the C library's.
template <class T>
void raise(T* values, int64_t count, T exponent) {
  constexpr T MIN_DISTANCE = T(1e-6);
  for (int64_t i = 0; i < count; ++i) values[i] = std::pow(std::max(values[i], MIN_DISTANCE), exponent);
}

void cosine_distances(int64_t tier, const Tensors& teacher, const Tensors& student, const std::vector<double>& weights,
                      double value_share, const Tensor& output) {
  const Checks check = check_arguments("cosine_distances", teacher, student, weights, value_share);
  check.tensor("output", output, {positions_of(teacher)});
  dispatch(teacher[0], [&](auto zero) {
    using T = decltype(zero);
    const LevelTable<T> table(teacher, student, weights);
    AnomalyMap<T> p = problem(table, teacher[0].size(0), value_share);
    p.distances = data<T>(output);
    run(cosine_distances_kernel<T>, tier, p);
  });
}

void cosine_distances_backward(int64_t tier, const Tensor& grad, const Tensors& teacher, const Tensors& student,
                               const std::vector<double>& weights, double value_share, const Tensors& grad_teacher,
                               const Tensors& grad_student) {
  const Checks check = check_arguments("cosine_distances_backward", teacher, student, weights, value_share);
  check.tensor("grad", grad, {positions_of(teacher)});
  check_gradients(check, "grad_teacher", grad_teacher, teacher);
  check_gradients(check, "grad_student", grad_student, student);
  dispatch(teacher[0], [&](auto zero) {
    using T = decltype(zero);
    const LevelTable<T> table(teacher, student, weights);
    const std::vector<T*> teacher_results = data<T>(grad_teacher), student_results = data<T>(grad_student);
    AnomalyMap<T> p = problem(table, teacher[0].size(0), value_share);
    p.grad = data<T>(grad);
    p.grad_teacher = teacher_results.data();
    p.grad_student = student_results.data();
    run(cosine_distances_backward_kernel<T>, tier, p);
  });
}

void anomaly_map(int64_t tier, const Tensors& teacher, const Tensors& student, const std::vector<double>& weights,
                 const std::vector<double>& exponents, double value_share, bool product, double sigma,
                 bool align_corners, const Tensor& output) {
  const Checks check = check_arguments("anomaly_map", teacher, student, weights, value_share);
  check.length("exponents", exponents.size(), teacher.size());
  check.in_range("sigma", sigma, 0.0, static_cast<double>(MAX_SIGMA));
  check.tensor("output", output, {teacher[0].size(0), ANY, ANY});
  check.not_empty("output", output, 1);
  dispatch(teacher[0], [&](auto zero) {
    using T = decltype(zero);
    const LevelTable<T> table(teacher, student, weights);
    AnomalyMap<T> p = problem(table, teacher[0].size(0), value_share);
    std::vector<T> distances(positions_of(teacher));
    p.distances = distances.data();
    p.height = output.size(1), p.width = output.size(2);
    p.product = product, p.align_corners = align_corners, p.sigma = static_cast<T>(sigma);
    p.map = data<T>(output);
    run(cosine_distances_kernel<T>, tier, p);
    T* next = p.distances;
    for (size_t l = 0; l < exponents.size(); ++l) {
      const int64_t count = p.batch * table.levels[l].pixels();
      if (exponents[l] != 1) raise(next, count, static_cast<T>(exponents[l]));
      next += count;
    }
    run(anomaly_map_kernel<T>, tier, p);
  });
}

}  // namespace
}  // namespace bkd

STABLE_TORCH_LIBRARY_FRAGMENT(bkd_fast_native, m) {
  m.def(
      "cosine_distances(int tier, Tensor[] teacher, Tensor[] student, float[] weights, float value_share, "
      "Tensor(a!) output) -> ()");
  m.def(
      "cosine_distances_backward(int tier, Tensor grad, Tensor[] teacher, Tensor[] student, float[] weights, "
      "float value_share, Tensor(a!)[] grad_teacher, Tensor(b!)[] grad_student) -> ()");
  m.def(
      "anomaly_map(int tier, Tensor[] teacher, Tensor[] student, float[] weights, float[] exponents, float value_share, "
      "bool product, float sigma, bool align_corners, Tensor(a!) output) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(bkd_fast_native, CPU, m) {
  m.impl("cosine_distances", TORCH_BOX(&bkd::cosine_distances));
  m.impl("cosine_distances_backward", TORCH_BOX(&bkd::cosine_distances_backward));
  m.impl("anomaly_map", TORCH_BOX(&bkd::anomaly_map));
}
