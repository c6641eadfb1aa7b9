// The distillation loss.
#include "distillation_loss.h"

#include "levels.h"

namespace bkd {
namespace {

std::vector<Integers> statistics_sizes(const Tensors& teacher, bool by_image) {
  std::vector<Integers> sizes;
  for (const Tensor& level : teacher)
    sizes.push_back({3 * level.size(0) * (by_image ? 1 : level.size(2) * level.size(3))});
  return sizes;
}

// channels: of each level, without padding to 16-byte chunks.
void loss(const Tensors& teacher, const Tensors& student, const Integers& channels, bool by_image, double value_weight,
          int64_t splits, const Tensors& statistics, const Tensors& parts, const Tensor& output) {
  const Checks check = check_pairs("distillation_loss", teacher, student, channels, 1);
  check_floats(check, "statistics", statistics, statistics_sizes(teacher, by_image));
  check.in_range("splits", splits, 1, 65535);
  check.length("parts", parts.size(), teacher.size());
  check.tensor("output", output, ScalarType::Float, {});
  std::vector<DistillationLoss> problems;
  for (size_t level = 0; level < teacher.size(); ++level) {
    DistillationLoss p{};
    p.pair = pair_of(teacher, student, level, 0);
    p.by_image = by_image;
    p.splits = static_cast<int>(splits);
    const std::string name = "parts[" + std::to_string(level) + "]";
    const Integers images = {p.pair.images, splits, 4}, pixels = {loss_parts(p), 2};
    check.tensor(name, parts[level], ScalarType::Float, by_image ? images : pixels);
    check.aligned(name, parts[level]);
    p.statistics = data<float>(statistics[level]), p.parts = data<float>(parts[level]);
    const double vectors = by_image ? p.pair.images : static_cast<double>(p.pair.vectors());
    p.direction = static_cast<float>(1 / std::max(vectors, 1.0));
    p.value = static_cast<float>(value_weight / std::max(static_cast<double>(p.pair.vectors() * channels[level]), 1.0));
    p.loss = data<float>(output);
    p.add = level > 0;
    problems.push_back(p);
  }
  const Current current(teacher[0]);
  for (const DistillationLoss& p : problems) distillation_loss(p, type_of(teacher[0]), current.device);
}

void loss_gradient(const Tensor& grad, const Tensors& teacher, const Tensors& student, const Integers& channels,
                   bool by_image, double value_weight, const Tensors& statistics, const Tensors& grad_teacher,
                   const Tensors& grad_student) {
  const Checks check = check_pairs("distillation_loss_backward", teacher, student, channels, 1);
  check.tensor("grad", grad, ScalarType::Float, {});
  check_floats(check, "statistics", statistics, statistics_sizes(teacher, by_image));
  check_gradients(check, "grad_teacher", grad_teacher, teacher);
  check_gradients(check, "grad_student", grad_student, student);
  const Current current(teacher[0]);
  for (size_t level = 0; level < teacher.size(); ++level) {
    PairGradient p{};
    p.pair = pair_of(teacher, student, level, 0);
    p.by_image = by_image;
    p.vectors = by_image ? p.pair.images : p.pair.vectors();
    p.statistics = data<float>(statistics[level]);
    p.grad = data<float>(grad);
    p.one_grad = true;
    p.direction[0] = static_cast<float>(1 / std::max(static_cast<double>(p.vectors), 1.0));
    p.value[0] =
        static_cast<float>(value_weight / std::max(static_cast<double>(p.pair.vectors() * channels[level]), 1.0));
    p.grad_teacher = data(grad_teacher[level]);
    p.grad_student[0] = data(grad_student[level]);
    pair_gradient(p, type_of(teacher[0]), current.device);
  }
}

}  // namespace
}  // namespace bkd

BKD_DEFINITIONS(m) {
  m.def(
      "distillation_loss(Tensor[] teacher, Tensor[] student, int[] channels, bool by_image, float value_weight, int "
      "splits, "
      "Tensor(a!)[] statistics, Tensor(b!)[] parts, Tensor(c!) output) -> ()");
  m.def(
      "distillation_loss_backward(Tensor grad, Tensor[] teacher, Tensor[] student, int[] channels, bool by_image, "
      "float value_weight, Tensor[] statistics, Tensor(a!)[] grad_teacher, Tensor(b!)[] grad_student) -> ()");
}

BKD_KERNELS(m) {
  m.impl("distillation_loss", TORCH_BOX(&bkd::loss));
  m.impl("distillation_loss_backward", TORCH_BOX(&bkd::loss_gradient));
}
