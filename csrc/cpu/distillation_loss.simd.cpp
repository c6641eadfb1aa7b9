// The distillation loss and its gradient: one read of the features each.
#include "distillation_loss.h"

#include "cosine.h"

namespace bkd {
namespace {

template <class T>
PartsOfLevels<T> parts_of(const DistillationLoss<T>& p) {
  return {p.level, p.levels, p.batch, p.by_pixel};
}

// Vectors of an image at one level, and those of all levels before it: pixels, or whole images.
template <class T>
int64_t level_vectors(const DistillationLoss<T>& p, int64_t level) {
  return p.by_pixel ? p.level[level].pixels() : 1;
}
template <class T>
int64_t vectors_before(const DistillationLoss<T>& p, const Part& part) {
  return p.by_pixel ? part.before : p.batch * part.level;
}

// Four sums of a task: of the cosine distances and of the squared differences (by pixel), or of an image's stretch.
struct Sums {
  double value[4];
};

template <class T>
void distillation_loss(const DistillationLoss<T>& p) {
  const PartsOfLevels<T> work = parts_of(p);
  const int64_t tasks = work.count();
  Scratch<Sums> found(tasks);
  in_parallel(p.parallel, tasks, [&](TaskQueue& queue) {
    Statistics<T> sums;
    for (int64_t task; (task = queue.next()) >= 0;) {
      const Part part = work.at(task);
      const Level<T>& level = p.level[part.level];
      const T *t = level.teacher + part.n * level.image(), *s = level.student[0] + part.n * level.image();
      Sums& result = found[task];
      if (!p.by_pixel) {
        T of[4];
        statistics_of<T, true>(t + part.begin, s + part.begin, part.count, of);
        for (int k = 0; k < 4; ++k) result.value[k] = of[k];
        continue;
      }
      statistics<T, true>(level, t, s, part.begin, part.count, sums);
      const int64_t vectors = p.batch * level.pixels(), at = part.n * level.pixels() + part.begin;
      T* kept = p.statistics + 3 * vectors_before(p, part);
      result = {{0, 0, 0, 0}};
      for (int64_t i = 0; i < part.count; ++i) {
        kept[at + i] = sums.dot[i];
        kept[vectors + at + i] = sums.teacher[i];
        kept[2 * vectors + at + i] = sums.student[i];
        result.value[0] += 1 - cosine(sums.dot[i], sums.teacher[i], sums.student[i]);
        result.value[3] += sums.difference[i];
      }
    }
  });
  double loss = 0;
  for (int64_t task = 0; task < tasks;) {
    const Part part = work.at(task);
    const Level<T>& level = p.level[part.level];
    const int64_t tiles = work.pieces(level);
    Sums sum = {{0, 0, 0, 0}};
    for (int64_t i = 0; i < tiles; ++i, ++task)
      for (int k = 0; k < 4; ++k) sum.value[k] += found[task].value[k];
    double direction = sum.value[0];
    if (!p.by_pixel) {
      T* kept = p.statistics + 3 * vectors_before(p, part) + part.n;
      for (int k = 0; k < 3; ++k) kept[k * p.batch] = T(sum.value[k]);
      direction = 1 - cosine(sum.value[0], sum.value[1], sum.value[2]);
    }
    loss += direction / double(p.batch * level_vectors(p, part.level));
    loss += double(p.value_weight) * sum.value[3] / double(p.batch * level.image());
  }
  *p.loss = T(loss);
}

template <class T>
void distillation_loss_backward(const DistillationLoss<T>& p) {
  const PartsOfLevels<T> work = parts_of(p);
  in_parallel(p.parallel, work.count(), [&](TaskQueue& queue) {
    alignas(64) T other[TILE], own_teacher[TILE], own_student[TILE];
    for (int64_t task; (task = queue.next()) >= 0;) {
      const Part part = work.at(task);
      const Level<T>& level = p.level[part.level];
      const int64_t image = part.n * level.image(), vectors = p.batch * level_vectors(p, part.level);
      const T *t = level.teacher + image, *s = level.student[0] + image;
      T *by_teacher = p.grad_teacher[part.level], *by_student = p.grad_student[part.level];
      const T by_cosine = -p.grad / T(vectors), by_square = p.grad * p.value_weight / T(p.batch * level.image());
      const T* kept = p.statistics + 3 * vectors_before(p, part) + part.n * level_vectors(p, part.level);
      if (!p.by_pixel) {
        const Slopes<T> slope = slopes(by_cosine, by_square, kept[0], kept[vectors], kept[2 * vectors]);
        const int64_t at = part.begin;
        if (by_teacher)
          combine(t + at, s + at, slope.own_teacher, slope.other, part.count, by_teacher + image + at, false);
        if (by_student)
          combine(s + at, t + at, slope.own_student, slope.other, part.count, by_student + image + at, false);
        continue;
      }
      for (int64_t i = 0; i < part.count; ++i) {
        const int64_t at = part.begin + i;
        const Slopes<T> slope = slopes(by_cosine, by_square, kept[at], kept[vectors + at], kept[2 * vectors + at]);
        other[i] = slope.other, own_teacher[i] = slope.own_teacher, own_student[i] = slope.own_student;
      }
      if (by_teacher) combine_pixels(level, t, s, own_teacher, other, part.begin, part.count, by_teacher + image, false);
      if (by_student) combine_pixels(level, s, t, own_student, other, part.begin, part.count, by_student + image, false);
    }
  });
}

}  // namespace

BKD_DEFINE_KERNEL(distillation_loss, DistillationLoss)
BKD_DEFINE_KERNEL(distillation_loss_backward, DistillationLoss)

}  // namespace bkd
