// The distillation loss.
#include "distillation_loss.h"

#include "levels.h"

namespace bkd {
namespace {

Checks check_arguments(const char* function, const Tensors& teacher, const Tensors& student, bool by_pixel,
                       const Tensor& statistics) {
  const Checks check = check_levels(function, teacher, student, KERNEL_TYPES, 1);
  int64_t vectors = 0;
  for (const Tensor& level : teacher) vectors += level.size(0) * (by_pixel ? level.size(2) * level.size(3) : 1);
  check.tensor("statistics", statistics, {3 * vectors});
  return check;
}

template <class T>
DistillationLoss<T> problem(const LevelTable<T>& table, int64_t batch, bool by_pixel, double value_weight,
                            const Tensor& statistics) {
  DistillationLoss<T> p{};
  p.batch = batch, p.levels = table.levels.size();
  p.level = table.levels.data();
  p.by_pixel = by_pixel, p.value_weight = static_cast<T>(value_weight);
  p.statistics = data<T>(statistics);
  return p;
}

void distillation_loss(int64_t tier, const Tensors& teacher, const Tensors& student, bool by_pixel, double value_weight,
                       const Tensor& statistics, const Tensor& output) {
  check_arguments("distillation_loss", teacher, student, by_pixel, statistics).tensor("output", output, {});
  dispatch(teacher[0], [&](auto zero) {
    using T = decltype(zero);
    const LevelTable<T> table(teacher, student, {});
    DistillationLoss<T> p = problem(table, teacher[0].size(0), by_pixel, value_weight, statistics);
    p.loss = data<T>(output);
    run(distillation_loss_kernel<T>, tier, p);
  });
}

void distillation_loss_backward(int64_t tier, const Tensor& grad, const Tensors& teacher, const Tensors& student,
                                const Tensor& statistics, bool by_pixel, double value_weight,
                                const Tensors& grad_teacher, const Tensors& grad_student) {
  const Checks check = check_arguments("distillation_loss_backward", teacher, student, by_pixel, statistics);
  check.tensor("grad", grad, {});
  check_gradients(check, "grad_teacher", grad_teacher, teacher);
  check_gradients(check, "grad_student", grad_student, student);
  dispatch(teacher[0], [&](auto zero) {
    using T = decltype(zero);
    const LevelTable<T> table(teacher, student, {});
    const std::vector<T*> teacher_results = data<T>(grad_teacher), student_results = data<T>(grad_student);
    DistillationLoss<T> p = problem(table, teacher[0].size(0), by_pixel, value_weight, statistics);
    p.grad = *data<T>(grad);
    p.grad_teacher = teacher_results.data();
    p.grad_student = student_results.data();
    run(distillation_loss_backward_kernel<T>, tier, p);
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
