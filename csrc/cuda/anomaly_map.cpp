#include "anomaly_map.h"

#include <cmath>

#include "levels.h"

namespace bkd {
namespace {

void all_distances(const Tensors& teacher, const Tensors& student, const std::vector<double>& weights,
                   double value_share, const Integers& channels, const Tensors& output, const Tensors& statistics) {
  const Current current(teacher[0]);
  const size_t branches = student.size() / teacher.size();
  for (size_t level = 0; level < teacher.size(); ++level) {
    for (size_t first = 0; first < branches; first += kMostBranches) {
      Distances p{};
      p.pair = pair_of(teacher, student, level, first);
      for (int b = 0; b < p.pair.branches; ++b)
        p.weight[b] = static_cast<float>(weights[(first + b) * teacher.size() + level]);
      p.value_share = static_cast<float>(value_share);
      p.channels = static_cast<int>(channels[level]);
      p.output = data<float>(output[level]);
      p.add = first > 0;
      if (!statistics.empty() && statistics[level].numel()) {
        p.statistics = data<float>(statistics[level]) + 3 * static_cast<int64_t>(first) * p.pair.vectors();
      }
      distances(p, type_of(teacher[0]), current.device);
    }
  }
}

void distances_gradient(const Tensors& grad, const Tensors& teacher, const Tensors& student,
                        const std::vector<double>& weights, double value_share, const Integers& channels,
                        const Tensors& statistics, const Tensors& grad_teacher, const Tensors& grad_student) {
  const Current current(teacher[0]);
  const size_t branches = student.size() / teacher.size();
  for (size_t level = 0; level < teacher.size(); ++level) {
    for (size_t first = 0; first < branches; first += kMostBranches) {
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

// Distances are (images, height, width), a level each.
void map(const Tensors& level_distances, bool product, double sigma, int64_t radius, bool align_corners,
         const Tensor& rows, const Tensor& output) {
  const Current current(output);
  if (level_distances.size() > kMostLevels)
    throw std::runtime_error("bkd_fast: more levels than the CUDA kernels take");
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
      "cosine_distances(Tensor[] teacher, Tensor[] student, float[] weights, float value_share, int[] channels, "
      "Tensor(a!)[] output, Tensor(b!)[] statistics) -> ()");
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
