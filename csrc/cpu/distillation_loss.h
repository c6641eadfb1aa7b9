// The distillation loss and its gradient: one read of the features each.
#pragma once

#include "cosine.h"

namespace bkd {
namespace {

constexpr int64_t STRETCH = 16384;  // numbers of a task where an image is one vector

// One task of all levels: numbers or pixels begin.. of image n; vectors: first of the level's statistics.
struct Part {
  int64_t level, n, begin, count, vectors;
};

template <class T>
int64_t level_vectors(const DistillationLoss<T>& p, int64_t level) {
  return p.by_pixel ? p.level[level].pixels() : 1;
}

template <class T>
int64_t units(const DistillationLoss<T>& p, const Level<T>& level) {
  return p.by_pixel ? level.pixels() : level.image();
}

template <class T>
int64_t part_count(const DistillationLoss<T>& p) {
  int64_t count = 0;
  for (int64_t l = 0; l < p.levels; ++l) count += p.batch * parts(units(p, p.level[l]), p.by_pixel ? TILE : STRETCH);
  return count;
}

template <class T>
Part part_of(const DistillationLoss<T>& p, int64_t task) {
  const int64_t step = p.by_pixel ? TILE : STRETCH;
  int64_t vectors = 0;
  for (int64_t l = 0, left = task;; ++l) {
    const int64_t whole = units(p, p.level[l]), tiles = parts(whole, step);
    if (left < p.batch * tiles) {
      const int64_t begin = left % tiles * step;
      return {l, left / tiles, begin, least(step, whole - begin), vectors};
    }
    left -= p.batch * tiles;
    vectors += p.batch * level_vectors(p, l);
  }
}

// Four sums of a task: of the cosine distances and of the squared differences (by pixel), or of an image's stretch.
struct Sums {
  double value[4];
};

template <class T>
void distillation_loss(const DistillationLoss<T>& p) {
  const int64_t tasks = part_count(p);
  Scratch<Sums> found(tasks);
  in_parallel(p.parallel, tasks, [&](Queue& queue) {
    Statistics<T> sums;
    for (int64_t task; (task = queue.next()) >= 0;) {
      const Part part = part_of(p, task);
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
      T* kept = p.statistics + 3 * part.vectors;
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
    const Part part = part_of(p, task);
    const Level<T>& level = p.level[part.level];
    const int64_t tiles = parts(units(p, level), p.by_pixel ? TILE : STRETCH);
    Sums sum = {{0, 0, 0, 0}};
    for (int64_t i = 0; i < tiles; ++i, ++task)
      for (int k = 0; k < 4; ++k) sum.value[k] += found[task].value[k];
    double direction = sum.value[0];
    if (!p.by_pixel) {
      T* kept = p.statistics + 3 * part.vectors + part.n;
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
  in_parallel(p.parallel, part_count(p), [&](Queue& queue) {
    alignas(64) T other[TILE], own_teacher[TILE], own_student[TILE];
    for (int64_t task; (task = queue.next()) >= 0;) {
      const Part part = part_of(p, task);
      const Level<T>& level = p.level[part.level];
      const int64_t image = part.n * level.image(), vectors = p.batch * level_vectors(p, part.level);
      const T *t = level.teacher + image, *s = level.student[0] + image;
      T *by_teacher = p.grad_teacher[part.level], *by_student = p.grad_student[part.level];
      const T by_cosine = -p.grad / T(vectors), by_square = p.grad * p.value_weight / T(p.batch * level.image());
      const T* kept = p.statistics + 3 * part.vectors + part.n * level_vectors(p, part.level);
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
}  // namespace bkd
