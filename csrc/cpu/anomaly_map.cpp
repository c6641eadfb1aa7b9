// The operators on pairs of teacher and student levels: anomaly map and distillation loss.
#include <algorithm>
#include <cmath>

#include "dispatch.h"

namespace bkd {
namespace {

using Tensors = std::vector<Tensor>;

// Levels with pointers into the tensors; students are given branch after branch.
template <class T>
struct Pairs {
  Pairs(const Tensors& teacher, const Tensors& student, const std::vector<double>& weights)
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

template <class T>
std::vector<T*> pointers(const Tensors& tensors) {
  std::vector<T*> found;
  for (const Tensor& tensor : tensors) found.push_back(data<T>(tensor));
  return found;
}

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
  by_type(teacher[0], [&](auto zero) {
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
  by_type(teacher[0], [&](auto zero) {
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
  by_type(teacher[0], [&](auto zero) {
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

template <class T>
DistillationLoss<T> problem(const Pairs<T>& pairs, int64_t batch, bool by_pixel, double value_weight,
                            const Tensor& statistics) {
  DistillationLoss<T> p{};
  p.parallel = run_parallel;
  p.batch = batch, p.levels = pairs.levels.size();
  p.level = pairs.levels.data();
  p.by_pixel = by_pixel, p.value_weight = static_cast<T>(value_weight);
  p.statistics = data<T>(statistics);
  return p;
}

void distillation_loss(int64_t tier, const Tensors& teacher, const Tensors& student, bool by_pixel, double value_weight,
                       const Tensor& statistics, const Tensor& output) {
  by_type(teacher[0], [&](auto zero) {
    using T = decltype(zero);
    const Pairs<T> pairs(teacher, student, {});
    DistillationLoss<T> p = problem(pairs, teacher[0].size(0), by_pixel, value_weight, statistics);
    p.loss = data<T>(output);
    kernels_of<T>(tier).distillation_loss(p);
  });
}

void distillation_loss_backward(int64_t tier, const Tensor& grad, const Tensors& teacher, const Tensors& student,
                                const Tensor& statistics, bool by_pixel, double value_weight,
                                const Tensors& grad_teacher, const Tensors& grad_student) {
  by_type(teacher[0], [&](auto zero) {
    using T = decltype(zero);
    const Pairs<T> pairs(teacher, student, {});
    const std::vector<T*> by_teacher = pointers<T>(grad_teacher), by_student = pointers<T>(grad_student);
    DistillationLoss<T> p = problem(pairs, teacher[0].size(0), by_pixel, value_weight, statistics);
    p.grad = *data<T>(grad);
    p.grad_teacher = by_teacher.data();
    p.grad_student = by_student.data();
    kernels_of<T>(tier).distillation_loss_backward(p);
  });
}

}  // namespace
}  // namespace bkd

STABLE_TORCH_LIBRARY_IMPL(bkd_fast_native, CPU, m) {
  m.impl("cosine_distances", TORCH_BOX(&bkd::cosine_distances));
  m.impl("cosine_distances_backward", TORCH_BOX(&bkd::cosine_distances_backward));
  m.impl("anomaly_map", TORCH_BOX(&bkd::anomaly_map));
  m.impl("distillation_loss", TORCH_BOX(&bkd::distillation_loss));
  m.impl("distillation_loss_backward", TORCH_BOX(&bkd::distillation_loss_backward));
}
