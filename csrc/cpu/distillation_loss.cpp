// The distillation loss.
#include "levels.h"

namespace bkd {
namespace {

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
  dispatch(teacher[0], [&](auto zero) {
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
  dispatch(teacher[0], [&](auto zero) {
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

STABLE_TORCH_LIBRARY_FRAGMENT(bkd_fast_native, m) {
  m.def(
      "distillation_loss(int tier, Tensor[] teacher, Tensor[] student, bool by_pixel, float value_weight, "
      "Tensor(a!) statistics, Tensor(b!) output) -> ()");
  m.def(
      "distillation_loss_backward(int tier, Tensor grad, Tensor[] teacher, Tensor[] student, Tensor statistics, "
      "bool by_pixel, float value_weight, Tensor(a!)[] grad_teacher, Tensor(b!)[] grad_student) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(bkd_fast_native, CPU, m) {
  m.impl("distillation_loss", TORCH_BOX(&bkd::distillation_loss));
  m.impl("distillation_loss_backward", TORCH_BOX(&bkd::distillation_loss_backward));
}
