#include "distillation_loss.h"

#include "levels.h"

namespace bkd {
namespace {

// channels: of each level, without those that only fill chunks.
void loss(const Tensors& teacher, const Tensors& student, const Integers& channels, bool by_image, double value_weight,
          int64_t splits, const Tensors& statistics, const Tensors& parts, const Tensor& output) {
  const Current current(teacher[0]);
  for (size_t level = 0; level < teacher.size(); ++level) {
    DistillationLoss p{};
    p.pair = pair_of(teacher, student, level, 0);
    p.by_image = by_image;
    p.splits = static_cast<int>(splits);
    p.statistics = data<float>(statistics[level]), p.parts = data<float>(parts[level]);
    const double vectors = by_image ? p.pair.images : static_cast<double>(p.pair.vectors());
    p.direction = static_cast<float>(1 / std::max(vectors, 1.0));
    p.value = static_cast<float>(value_weight / std::max(static_cast<double>(p.pair.vectors() * channels[level]), 1.0));
    p.loss = data<float>(output);
    p.add = level > 0;
    distillation_loss(p, type_of(teacher[0]), current.device);
  }
}

void loss_gradient(const Tensor& grad, const Tensors& teacher, const Tensors& student, const Integers& channels,
                   bool by_image, double value_weight, const Tensors& statistics, const Tensors& grad_teacher,
                   const Tensors& grad_student) {
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
