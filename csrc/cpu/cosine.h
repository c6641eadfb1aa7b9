// Cosine and squared distance of teacher and student at every pixel, and what gradients of them need, from one read.
#pragma once

#include "level.h"
#include "simd.h"
#include "work.h"

namespace bkd {
namespace {

// Pixels of a task at most: a page of each channel, where pixels lie side by side; else a quarter of it does.
constexpr int64_t TILE = 1024;
constexpr int64_t STRETCH = 16384;  // numbers of a task, where an image is one vector

// One task: units begin.. of image n of a level; before: units of all images of the levels before it.
struct Part {
  int64_t level, n, begin, count, before;
};

// The images of all levels cut into tasks; their units are pixels, or numbers.
template <class T>
struct PartsOfLevels {
  const Level<T>* level;
  int64_t levels, batch;
  bool by_pixel;

  int64_t step(const Level<T>& one) const { return !by_pixel ? STRETCH : one.pixel_stride == 1 ? TILE : TILE / 4; }
  int64_t units(const Level<T>& one) const { return by_pixel ? one.pixels() : one.image(); }
  int64_t pieces(const Level<T>& one) const { return parts(units(one), step(one)); }
  int64_t count() const {
    int64_t total = 0;
    for (int64_t l = 0; l < levels; ++l) total += batch * pieces(level[l]);
    return total;
  }
  Part at(int64_t task) const {
    int64_t before = 0;
    for (int64_t l = 0;; ++l) {
      const int64_t whole = units(level[l]), each = pieces(level[l]), size = step(level[l]);
      if (task < batch * each) {
        const int64_t begin = task % each * size;
        return {l, task / each, begin, least(size, whole - begin), before};
      }
      task -= batch * each;
      before += batch * whole;
    }
  }
};

// Of a tile of pixels: <t, s>, |t|^2, |s|^2, |t - s|^2.
template <class T>
struct Statistics {
  alignas(64) T dot[TILE], teacher[TILE], student[TILE], difference[TILE];
};

// Channels-first: pixels lie side by side. Four channels at a time, so that the sums are not moved for each of them.
template <class T, bool Difference>
void statistics_by_channel(const T* t, const T* s, int64_t channels, int64_t stride, int64_t count, Statistics<T>& sums) {
  constexpr int W = LANES<T>;
  for (T* sum : {sums.dot, sums.teacher, sums.student, sums.difference}) std::memset(sum, 0, count * sizeof(T));
  const int64_t whole = count / W * W;
  for (int64_t c = 0; c < channels; c += 4) {
    const int64_t last = least(c + 4, channels);
    for (int64_t i = 0; i < whole; i += W) {
      Vec<T> dot = load(sums.dot + i), tt = load(sums.teacher + i), ss = load(sums.student + i);
      Vec<T> difference = load(sums.difference + i);
      for (int64_t k = c; k < last; ++k) {
        const Vec<T> a = load(t + k * stride + i), b = load(s + k * stride + i);
        dot += a * b;
        tt += a * a;
        ss += b * b;
        if (Difference) difference += (a - b) * (a - b);
      }
      store(sums.dot + i, dot);
      store(sums.teacher + i, tt);
      store(sums.student + i, ss);
      if (Difference) store(sums.difference + i, difference);
    }
    for (int64_t k = c; k < last; ++k)
      for (int64_t i = whole; i < count; ++i) {
        const T a = t[k * stride + i], b = s[k * stride + i];
        sums.dot[i] += a * b;
        sums.teacher[i] += a * a;
        sums.student[i] += b * b;
        if (Difference) sums.difference[i] += (a - b) * (a - b);
      }
  }
}

// The sums of two runs of numbers: sums[0..4) = <t, s>, |t|^2, |s|^2, |t - s|^2.
template <class T, bool Difference>
BKD_INLINE void statistics_of(const T* t, const T* s, int64_t count, T* sums) {
  constexpr int W = LANES<T>;
  Vec<T> dot[2] = {}, tt[2] = {}, ss[2] = {}, difference[2] = {};
  int64_t i = 0;
  for (; i + 2 * W <= count; i += 2 * W)
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const Vec<T> a = load(t + i + h * W), b = load(s + i + h * W);
      dot[h] += a * b;
      tt[h] += a * a;
      ss[h] += b * b;
      if (Difference) difference[h] += (a - b) * (a - b);
    }
  sums[0] = lane_sum<T>(dot[0] + dot[1]);
  sums[1] = lane_sum<T>(tt[0] + tt[1]);
  sums[2] = lane_sum<T>(ss[0] + ss[1]);
  sums[3] = Difference ? lane_sum<T>(difference[0] + difference[1]) : T(0);
  for (; i < count; ++i) {
    sums[0] += t[i] * s[i];
    sums[1] += t[i] * t[i];
    sums[2] += s[i] * s[i];
    if (Difference) sums[3] += (t[i] - s[i]) * (t[i] - s[i]);
  }
}

// Pixels begin.. of one image; t and s point to the image.
template <class T, bool Difference>
void statistics(const Level<T>& level, const T* t, const T* s, int64_t begin, int64_t count, Statistics<T>& sums) {
  if (level.pixel_stride == 1)
    return statistics_by_channel<T, Difference>(t + begin, s + begin, level.channels, level.channel_stride, count, sums);
  for (int64_t i = 0; i < count; ++i) {
    T of[4];
    const int64_t at = (begin + i) * level.pixel_stride;
    statistics_of<T, Difference>(t + at, s + at, level.channels, of);
    sums.dot[i] = of[0], sums.teacher[i] = of[1], sums.student[i] = of[2], sums.difference[i] = of[3];
  }
}

template <class T>
BKD_INLINE T cosine(T dot, T teacher, T student) {
  const T norms = std::sqrt(teacher * student), least_norms = T(LEAST_NORMS);
  return dot / (norms > least_norms ? norms : (norms == norms ? least_norms : norms));
}

// Gradient of by_cosine * cos + by_square * |t - s|^2, which is linear in t and s:
// by teacher `own_teacher` t + `other` s, by student `own_student` s + `other` t.
template <class T>
struct Slopes {
  T other, own_teacher, own_student;
};

template <class T>
BKD_INLINE Slopes<T> slopes(T by_cosine, T by_square, T dot, T teacher, T student) {
  const T norms = std::sqrt(teacher * student), tiny = T(LEAST_NORMS * LEAST_NORMS), least_norms = T(LEAST_NORMS);
  const T across = by_cosine / (norms > least_norms ? norms : least_norms);
  const bool regular = norms > least_norms;  // a clamped norm is a constant
  const T by_teacher = regular ? dot / (teacher > tiny ? teacher : tiny) : T(0);
  const T by_student = regular ? dot / (student > tiny ? student : tiny) : T(0);
  return {across - 2 * by_square, 2 * by_square - across * by_teacher, 2 * by_square - across * by_student};
}

// result (+)= own * values + other * others, number by number.
template <class T>
BKD_INLINE void combine(const T* values, const T* others, T own, T other, int64_t count, T* result, bool add) {
  constexpr int W = LANES<T>;
  int64_t i = 0;
  for (; i + W <= count; i += W) {
    const Vec<T> sum = own * load(values + i) + other * load(others + i);
    store(result + i, add ? load(result + i) + sum : sum);
  }
  for (; i < count; ++i) result[i] = own * values[i] + other * others[i] + (add ? result[i] : T(0));
}

// The same with factors for each pixel, for pixels begin.. of one image.
template <class T>
void combine_pixels(const Level<T>& level, const T* values, const T* others, const T* own, const T* other, int64_t begin,
                    int64_t count, T* result, bool add) {
  constexpr int W = LANES<T>;
  if (level.pixel_stride != 1) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = (begin + i) * level.pixel_stride;
      combine(values + at, others + at, own[i], other[i], level.channels, result + at, add);
    }
    return;
  }
  for (int64_t c = 0; c < level.channels; ++c) {
    const int64_t at = c * level.channel_stride + begin;
    int64_t i = 0;
    for (; i + W <= count; i += W) {
      const Vec<T> sum = load(own + i) * load(values + at + i) + load(other + i) * load(others + at + i);
      store(result + at + i, add ? load(result + at + i) + sum : sum);
    }
    for (; i < count; ++i)
      result[at + i] = own[i] * values[at + i] + other[i] * others[at + i] + (add ? result[at + i] : T(0));
  }
}

}  // namespace
}  // namespace bkd
