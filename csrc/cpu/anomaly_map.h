// The anomaly map: distances at every level from one read of the features, then upsampling, fusion and smoothing.
#pragma once

#include "cosine.h"

namespace bkd {
namespace {

template <class T>
PartsOfLevels<T> tiles_of(const AnomalyMap<T>& p) {
  return {p.level, p.levels, p.batch, true};
}

template <class T>
void distances(const AnomalyMap<T>& p) {
  const PartsOfLevels<T> tiles = tiles_of(p);
  in_parallel(p.parallel, tiles.count(), [&](Queue& queue) {
    Statistics<T> sums;
    for (int64_t task; (task = queue.next()) >= 0;) {
      const Part tile = tiles.at(task);
      const Level<T>& level = p.level[tile.level];
      T* to = p.distances + tile.before + tile.n * level.pixels() + tile.begin;
      for (int64_t b = 0; b < p.branches; ++b) {
        const T *t = level.teacher + tile.n * level.image(), *s = level.student[b] + tile.n * level.image();
        if (p.value_share > 0)
          statistics<T, true>(level, t, s, tile.begin, tile.count, sums);
        else
          statistics<T, false>(level, t, s, tile.begin, tile.count, sums);
        for (int64_t i = 0; i < tile.count; ++i) {
          const T direction = 1 - cosine(sums.dot[i], sums.teacher[i], sums.student[i]);
          const T square = p.value_share > 0 ? sums.difference[i] / T(level.channels) : T(0);
          const T distance = level.weight[b] * ((1 - p.value_share) * direction + p.value_share * square);
          to[i] = b ? to[i] + distance : distance;
        }
      }
    }
  });
}

template <class T>
void distances_backward(const AnomalyMap<T>& p) {
  const PartsOfLevels<T> tiles = tiles_of(p);
  in_parallel(p.parallel, tiles.count(), [&](Queue& queue) {
    Statistics<T> sums;
    alignas(64) T other[TILE], own_teacher[TILE], own_student[TILE];
    for (int64_t task; (task = queue.next()) >= 0;) {
      const Part tile = tiles.at(task);
      const Level<T>& level = p.level[tile.level];
      const int64_t image = tile.n * level.image();
      const T* grad = p.grad + tile.before + tile.n * level.pixels() + tile.begin;
      for (int64_t b = 0; b < p.branches; ++b) {
        const T *t = level.teacher + image, *s = level.student[b] + image;
        T *by_teacher = p.grad_teacher[tile.level], *by_student = p.grad_student[b * p.levels + tile.level];
        if (!by_teacher && !by_student) continue;
        statistics<T, false>(level, t, s, tile.begin, tile.count, sums);
        for (int64_t i = 0; i < tile.count; ++i) {
          const T by_distance = grad[i] * level.weight[b];
          const Slopes<T> slope = slopes(-(1 - p.value_share) * by_distance, p.value_share * by_distance / T(level.channels),
                                         sums.dot[i], sums.teacher[i], sums.student[i]);
          other[i] = slope.other, own_teacher[i] = slope.own_teacher, own_student[i] = slope.own_student;
        }
        if (by_teacher) combine_pixels(level, t, s, own_teacher, other, tile.begin, tile.count, by_teacher + image, b > 0);
        if (by_student) combine_pixels(level, s, t, own_student, other, tile.begin, tile.count, by_student + image, false);
      }
    }
  });
}

// Where output position `at` of an axis lies between two input positions.
template <class T>
struct Between {
  int64_t low, high;
  T share;  // of high
};

template <class T>
Between<T> between(int64_t at, int64_t input, int64_t output, bool align_corners) {
  const T scale = align_corners ? (output > 1 ? T(input - 1) / T(output - 1) : T(0)) : T(input) / T(output);
  const T source = align_corners ? scale * T(at) : scale * (T(at) + T(0.5)) - T(0.5);
  const T position = source > 0 ? source : T(0);
  const int64_t low = least(static_cast<int64_t>(position), input - 1);
  return {low, least(low + 1, input - 1), position - T(low)};
}

// Index i of an axis that is mirrored at both ends, again and again.
inline int64_t mirrored(int64_t i, int64_t length) {
  const int64_t folded = ((i % (2 * length)) + 2 * length) % (2 * length);
  return least(folded, 2 * length - 1 - folded);
}

// One row of the fused levels.
template <class T>
void fuse_row(const AnomalyMap<T>& p, int64_t n, int64_t y, const Between<T>* columns, T* blended, T* row) {
  int64_t first = 0;
  for (int64_t l = 0; l < p.levels; ++l) {
    const Level<T>& level = p.level[l];
    const T* image = p.distances + first + n * level.pixels();
    first += p.batch * level.pixels();
    const Between<T> rows = between<T>(y, level.height, p.height, p.align_corners);
    for (int64_t x = 0; x < level.width; ++x)
      blended[x] = (1 - rows.share) * image[rows.low * level.width + x] + rows.share * image[rows.high * level.width + x];
    const Between<T>* at = columns + l * p.width;
    for (int64_t x = 0; x < p.width; ++x) {
      const T value = (1 - at[x].share) * blended[at[x].low] + at[x].share * blended[at[x].high];
      row[x] = l == 0 ? value : (p.product ? row[x] * value : row[x] + value);
    }
  }
}

// to[i] = sum over j of kernel[j] rows[j][i].
template <class T>
void add_rows(const T* const* rows, const T* kernel, int64_t size, int64_t count, T* to) {
  constexpr int W = LANES<T>;
  int64_t i = 0;
  for (; i + 4 * W <= count; i += 4 * W) {
    Vec<T> sum[4] = {};
    for (int64_t j = 0; j < size; ++j) {
      const Vec<T> factor = all(kernel[j]);
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) sum[v] += factor * load(rows[j] + i + v * W);
    }
    for (int v = 0; v < 4; ++v) store(to + i + v * W, sum[v]);
  }
  for (; i < count; ++i) {
    T sum = 0;
    for (int64_t j = 0; j < size; ++j) sum += kernel[j] * rows[j][i];
    to[i] = sum;
  }
}

template <class T>
void anomaly_map(const AnomalyMap<T>& p) {
  constexpr int64_t ROWS = 16;
  const int64_t radius = static_cast<int64_t>(4 * p.sigma + T(0.5)), size = 2 * radius + 1;
  const int64_t bands = parts(p.height, ROWS), area = p.height * p.width;
  const bool smooth = p.sigma > 0;
  Scratch<T> kernel(size);
  double total = 0;
  for (int64_t j = 0; j < size && smooth; ++j) {
    const double steps = double(j - radius) / double(p.sigma);
    total += kernel[j] = T(std::exp(-0.5 * steps * steps));
  }
  for (int64_t j = 0; j < size && smooth; ++j) kernel[j] = T(kernel[j] / total);
  Scratch<Between<T>> columns(p.levels * p.width);
  int64_t widest = 0;
  for (int64_t l = 0; l < p.levels; ++l) {
    widest = most(widest, p.level[l].width);
    for (int64_t x = 0; x < p.width; ++x)
      columns[l * p.width + x] = between<T>(x, p.level[l].width, p.width, p.align_corners);
  }
  Scratch<T> along(smooth ? p.batch * area : 0);  // smoothed along the rows only
  in_parallel(p.parallel, p.batch * bands, [&](Queue& queue) {
    Scratch<T> blended(widest), row(p.width + 2 * radius);
    Scratch<const T*> shifted(size);
    for (int64_t j = 0; j < size; ++j) shifted[j] = row + j;
    for (int64_t task; (task = queue.next()) >= 0;) {
      const int64_t n = task / bands, begin = task % bands * ROWS;
      for (int64_t y = begin; y < least(begin + ROWS, p.height); ++y) {
        if (!smooth) {
          fuse_row<T>(p, n, y, columns, blended, p.map + n * area + y * p.width);
          continue;
        }
        fuse_row<T>(p, n, y, columns, blended, row + radius);
        for (int64_t j = 1; j <= radius; ++j) {
          row[radius - j] = row[radius + mirrored(-j, p.width)];
          row[radius + p.width - 1 + j] = row[radius + mirrored(p.width - 1 + j, p.width)];
        }
        add_rows<T>(shifted, kernel, size, p.width, along + n * area + y * p.width);
      }
    }
  });
  if (!smooth) return;
  in_parallel(p.parallel, p.batch * bands, [&](Queue& queue) {
    Scratch<const T*> rows(size);
    for (int64_t task; (task = queue.next()) >= 0;) {
      const int64_t n = task / bands, begin = task % bands * ROWS;
      for (int64_t y = begin; y < least(begin + ROWS, p.height); ++y) {
        for (int64_t j = 0; j < size; ++j) rows[j] = along + n * area + mirrored(y + j - radius, p.height) * p.width;
        add_rows<T>(rows, kernel, size, p.width, p.map + n * area + y * p.width);
      }
    }
  });
}

}  // namespace
}  // namespace bkd
