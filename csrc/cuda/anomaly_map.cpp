// The anomaly map.
#include "anomaly_map.h"

#include <cmath>

#include "levels.h"

namespace bkd {
namespace {

Checks check_arguments(const char* function, const Tensors& teacher, const Tensors& student,
                       const std::vector<double>& weights, double value_share, const Integers& channels) {
  const Checks check = check_pairs(function, teacher, student, channels);
  check.length("weights", weights.size(), student.size());
  check.in_range("value_share", value_share, 0.0, 1.0);
  return check;
}

std::vector<Integers> map_sizes(const Tensors& teacher) {
  std::vector<Integers> sizes;
  for (const Tensor& level : teacher) sizes.push_back({level.size(0), level.size(2), level.size(3)});
  return sizes;
}
std::vector<Integers> statistics_sizes(const Tensors& teacher, const Tensors& student) {
  std::vector<Integers> sizes;
  const int64_t branches = student.size() / teacher.size();
  for (const Tensor& level : teacher) sizes.push_back({branches, 3, level.size(0) * level.size(2) * level.size(3)});
  return sizes;
}

// exponents: of the levels; all 1: sums as they are, with statistics if asked for.
void all_distances(const Tensors& teacher, const Tensors& student, const std::vector<double>& weights,
                   const std::vector<double>& exponents, double value_share, const Integers& channels,
                   const Tensors& output, const Tensors& statistics) {
  const Checks check = check_arguments("cosine_distances", teacher, student, weights, value_share, channels);
  check.length("exponents", exponents.size(), teacher.size());
  check_floats(check, "output", output, map_sizes(teacher));
  if (!statistics.empty()) check_floats(check, "statistics", statistics, statistics_sizes(teacher, student));
  const Current current(teacher[0]);
  const size_t branches = student.size() / teacher.size();
  for (size_t first = 0; first < branches; first += kMaxBranches) {
    for (const bool channels_first : {false, true}) {
      Distances p{};
      p.value_share = static_cast<float>(value_share);
      p.add = first > 0, p.raise = first + kMaxBranches >= branches;
      for (size_t level = 0; level < teacher.size(); ++level) {
        const Pair pair = pair_of(teacher, student, level, first);
        if (pair.channels_first == channels_first) {
          Distances::Level& own = p.level[p.levels++];
          own.pair = pair;
          for (int b = 0; b < pair.branches; ++b)
            own.weight[b] = static_cast<float>(weights[(first + b) * teacher.size() + level]);
          own.channels = static_cast<int>(channels[level]), own.exponent = static_cast<float>(exponents[level]);
          own.output = data<float>(output[level]), own.statistics = nullptr;
          if (!statistics.empty() && statistics[level].numel()) {
            own.statistics = data<float>(statistics[level]) + 3 * static_cast<int64_t>(first) * pair.vectors();
          }
        }
        if (p.levels == kMaxLevels || (p.levels && level + 1 == teacher.size())) {
          distances(p, type_of(teacher[0]), current.device);
          p.levels = 0;
        }
      }
    }
  }
}

void distances_gradient(const Tensors& grad, const Tensors& teacher, const Tensors& student,
                        const std::vector<double>& weights, double value_share, const Integers& channels,
                        const Tensors& statistics, const Tensors& grad_teacher, const Tensors& grad_student) {
  const Checks check = check_arguments("cosine_distances_backward", teacher, student, weights, value_share, channels);
  check_floats(check, "grad", grad, map_sizes(teacher));
  check_floats(check, "statistics", statistics, statistics_sizes(teacher, student));
  check_gradients(check, "grad_teacher", grad_teacher, teacher);
  check_gradients(check, "grad_student", grad_student, student);
  const Current current(teacher[0]);
  const size_t branches = student.size() / teacher.size();
  for (size_t level = 0; level < teacher.size(); ++level) {
    for (size_t first = 0; first < branches; first += kMaxBranches) {
      PairGradient p{};
      p.pair = pair_of(teacher, student, level, first);
      p.vectors = p.pair.vectors();
      p.statistics = data<float>(statistics[level]) + 3 * static_cast<int64_t>(first) * p.vectors;
      p.grad = data<float>(grad[level]);
      for (int b = 0; b < p.pair.branches; ++b) {
        const size_t index = (first + b) * teacher.size() + level;
        p.direction[b] = static_cast<float>(weights[index] * (1 - value_share));
        p.value[b] = static_cast<float>(weights[index] * value_share / static_cast<double>(channels[level]));
        p.grad_student[b] = data(grad_student[index]);
      }
      p.grad_teacher = data(grad_teacher[level]);
      p.add = first > 0;
      pair_gradient(p, type_of(teacher[0]), current.device);
    }
  }
}

// level_distances: one (images, height, width) per level.
void map(const Tensors& level_distances, bool product, double sigma, int64_t radius, bool align_corners,
         const Tensor& rows, const Tensor& output) {
  const Checks check("anomaly_map", "output", output, {ScalarType::Float});
  check.tensor("output", output, {ANY, ANY, ANY});
  check.not_empty("output", output, 1);
  check.in_range("the number of levels", static_cast<int64_t>(level_distances.size()), 1, kMaxLevels);
  for (size_t i = 0; i < level_distances.size(); ++i) {
    const std::string name = "distances[" + std::to_string(i) + "]";
    check.tensor(name, level_distances[i], {output.size(0), ANY, ANY});
    check.not_empty(name, level_distances[i], 1);
  }
  check.in_range("radius", radius, 0, 4 * MAX_SIGMA);
  check.that(sigma > 0 || radius == 0, "sigma", "is " + std::to_string(sigma), "a number above 0");
  if (radius) check.tensor("rows", rows, sizes_of(output));
  const Current current(output);
  AnomalyMap p{};
  p.levels = static_cast<int>(level_distances.size());
  for (int level = 0; level < p.levels; ++level) {
    const Tensor& d = level_distances[level];
    p.distances[level] = data<float>(d);
    p.level_height[level] = static_cast<int>(d.size(1)), p.level_width[level] = static_cast<int>(d.size(2));
  }
  p.images = static_cast<int>(output.size(0)), p.height = static_cast<int>(output.size(1));
  p.width = static_cast<int>(output.size(2));
  p.radius = static_cast<int>(radius), p.sigma = static_cast<float>(sigma);
  p.product = product, p.align_corners = align_corners;
  double sum = 1;
  for (int i = 1; i <= p.radius; ++i) sum += 2 * std::exp(-0.5 * (i / sigma) * (i / sigma));
  p.scale = static_cast<float>(1 / sum);
  p.rows = data<float>(rows), p.output = data<float>(output);
  anomaly_map(p, current.device);
}

}  // namespace
}  // namespace bkd

BKD_DEFINITIONS(m) {
  m.def(
      "cosine_distances(Tensor[] teacher, Tensor[] student, float[] weights, float[] exponents, float value_share, "
      "int[] channels, Tensor(a!)[] output, Tensor(b!)[] statistics) -> ()");
  m.def(
      "cosine_distances_backward(Tensor[] grad, Tensor[] teacher, Tensor[] student, float[] weights, float "
      "value_share, "
      "int[] channels, Tensor[] statistics, Tensor(a!)[] grad_teacher, Tensor(b!)[] grad_student) -> ()");
  m.def(
      "anomaly_map(Tensor[] distances, bool product, float sigma, int radius, bool align_corners, Tensor(a!) rows, "
      "Tensor(b!) output) -> ()");
}

BKD_KERNELS(m) {
  m.impl("cosine_distances", TORCH_BOX(&bkd::all_distances));
  m.impl("cosine_distances_backward", TORCH_BOX(&bkd::distances_gradient));
  m.impl("anomaly_map", TORCH_BOX(&bkd::map));
}
