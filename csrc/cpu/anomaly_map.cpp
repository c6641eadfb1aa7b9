// The anomaly map.
#include <algorithm>
#include <cmath>

#include "levels.h"

namespace bkd {
namespace {

template <class T>
AnomalyMap<T> problem(const Pairs<T>& pairs, int64_t batch, double value_share) {
  AnomalyMap<T> p{};
  p.parallel = run_parallel;
  p.batch = batch, p.levels = pairs.levels.size(), p.branches = pairs.branches;
  p.level = pairs.levels.data();
  p.value_share = static_cast<T>(value_share);
  return p;
}

// To a power; few enough numbers, one a feature pixel, for the C library's.
template <class T>
void raise(T* values, int64_t count, T exponent) {
  constexpr T LEAST = T(1e-6);
  for (int64_t i = 0; i < count; ++i) values[i] = std::pow(std::max(values[i], LEAST), exponent);
}

void cosine_distances(int64_t tier, const Tensors& teacher, const Tensors& student, const std::vector<double>& weights,
                      double value_share, const Tensor& output) {
  dispatch(teacher[0], [&](auto zero) {
    using T = decltype(zero);
    const Pairs<T> pairs(teacher, student, weights);
    AnomalyMap<T> p = problem(pairs, teacher[0].size(0), value_share);
    p.distances = data<T>(output);
    kernels_of<T>(tier).distances(p);
  });
}

void cosine_distances_backward(int64_t tier, const Tensor& grad, const Tensors& teacher, const Tensors& student,
                               const std::vector<double>& weights, double value_share, const Tensors& grad_teacher,
                               const Tensors& grad_student) {
  dispatch(teacher[0], [&](auto zero) {
    using T = decltype(zero);
    const Pairs<T> pairs(teacher, student, weights);
    const std::vector<T*> by_teacher = pointers<T>(grad_teacher), by_student = pointers<T>(grad_student);
    AnomalyMap<T> p = problem(pairs, teacher[0].size(0), value_share);
    p.grad = data<T>(grad);
    p.grad_teacher = by_teacher.data();
    p.grad_student = by_student.data();
    kernels_of<T>(tier).distances_backward(p);
  });
}

void anomaly_map(int64_t tier, const Tensors& teacher, const Tensors& student, const std::vector<double>& weights,
                 const std::vector<double>& exponents, double value_share, bool product, double sigma,
                 bool align_corners, const Tensor& output) {
  dispatch(teacher[0], [&](auto zero) {
    using T = decltype(zero);
    const Pairs<T> pairs(teacher, student, weights);
    AnomalyMap<T> p = problem(pairs, teacher[0].size(0), value_share);
    int64_t positions = 0;
    for (const Level<T>& level : pairs.levels) positions += p.batch * level.pixels();
    std::vector<T> distances(positions);
    p.distances = distances.data();
    p.height = output.size(1), p.width = output.size(2);
    p.product = product, p.align_corners = align_corners, p.sigma = static_cast<T>(sigma);
    p.map = data<T>(output);
    kernels_of<T>(tier).distances(p);
    T* next = p.distances;
    for (size_t l = 0; l < exponents.size(); ++l) {
      const int64_t count = p.batch * pairs.levels[l].pixels();
      if (exponents[l] != 1) raise(next, count, static_cast<T>(exponents[l]));
      next += count;
    }
    kernels_of<T>(tier).anomaly_map(p);
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
