// The anomaly map: distances at every level from one read of the features, then upsampling, fusion and smoothing.
#include "anomaly_map.h"

#include "cosine.h"

namespace bkd {
namespace {

template <class T>
PartsOfLevels<T> tiles_of(const AnomalyMap<T>& p) {
  return {p.level, p.levels, p.batch, true};
}

template <class T>
void cosine_distances(const AnomalyMap<T>& p) {
  const PartsOfLevels<T> tiles = tiles_of(p);
  in_parallel(p.parallel, tiles.count(), [&](TaskQueue& queue) {
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
void cosine_distances_backward(const AnomalyMap<T>& p) {
  const PartsOfLevels<T> tiles = tiles_of(p);
  in_parallel(p.parallel, tiles.count(), [&](TaskQueue& queue) {
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

// A band of output rows from the levels: rows that lie between the same two input rows share what is worked out along them.
template <class T>
class Band {
 public:
  // Columns of all levels, worked out once for a whole map: columns[l * width + x].
  Band(const AnomalyMap<T>& p, const Between<T>* columns, int64_t height)
      : p_(p), columns_(columns), room_(rows_needed(p, height)), wide_(p.levels * room_ * p.width), first_(p.levels) {}

  // Output rows begin.. to end of image n are next.
  void start(int64_t n, int64_t begin, int64_t end) {
    int64_t before = 0;
    for (int64_t l = 0; l < p_.levels; ++l) {
      const Level<T>& level = p_.level[l];
      const T* image = p_.distances + before + n * level.pixels();
      before += p_.batch * level.pixels();
      first_[l] = at(l, begin).low;
      const Between<T>* columns = columns_ + l * p_.width;
      for (int64_t y = first_[l]; y <= at(l, end - 1).high; ++y) {
        const T* from = image + y * level.width;
        T* to = row(l, y);
        for (int64_t x = 0; x < p_.width; ++x)
          to[x] = (1 - columns[x].share) * from[columns[x].low] + columns[x].share * from[columns[x].high];
      }
    }
  }
  // One of these rows, of the fused levels.
  void fuse(int64_t y, T* to) const {
    for (int64_t l = 0; l < p_.levels; ++l) {
      const Between<T> rows = at(l, y);
      const T *low = row(l, rows.low), *high = row(l, rows.high), share = rows.share, other = 1 - rows.share;
      if (l == 0)
        for (int64_t x = 0; x < p_.width; ++x) to[x] = other * low[x] + share * high[x];
      else if (p_.product)
        for (int64_t x = 0; x < p_.width; ++x) to[x] *= other * low[x] + share * high[x];
      else
        for (int64_t x = 0; x < p_.width; ++x) to[x] += other * low[x] + share * high[x];
    }
  }

 private:
  static int64_t rows_needed(const AnomalyMap<T>& p, int64_t height) {
    int64_t most_rows = 0;
    for (int64_t l = 0; l < p.levels; ++l)
      for (int64_t begin = 0; begin < p.height; begin += height) {
        const int64_t end = least(begin + height, p.height) - 1, input = p.level[l].height;
        most_rows = most(most_rows, between<T>(end, input, p.height, p.align_corners).high -
                                        between<T>(begin, input, p.height, p.align_corners).low + 1);
      }
    return most_rows;
  }
  Between<T> at(int64_t l, int64_t y) const { return between<T>(y, p_.level[l].height, p_.height, p_.align_corners); }
  T* row(int64_t l, int64_t y) const { return wide_ + (l * room_ + y - first_[l]) * p_.width; }

  const AnomalyMap<T>& p_;
  const Between<T>* columns_;
  const int64_t room_;
  Scratch<T> wide_;
  Scratch<int64_t> first_;
};

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
  for (int64_t l = 0; l < p.levels; ++l)
    for (int64_t x = 0; x < p.width; ++x)
      columns[l * p.width + x] = between<T>(x, p.level[l].width, p.width, p.align_corners);
  Scratch<T> along(smooth ? p.batch * area : 0);  // smoothed along the rows only
  in_parallel(p.parallel, p.batch * bands, [&](TaskQueue& queue) {
    Band<T> band(p, columns, ROWS);
    Scratch<T> row(p.width + 2 * radius);
    Scratch<const T*> shifted(size);
    for (int64_t j = 0; j < size; ++j) shifted[j] = row + j;
    for (int64_t task; (task = queue.next()) >= 0;) {
      const int64_t n = task / bands, begin = task % bands * ROWS, end = least(begin + ROWS, p.height);
      band.start(n, begin, end);
      for (int64_t y = begin; y < end; ++y) {
        if (!smooth) {
          band.fuse(y, p.map + n * area + y * p.width);
          continue;
        }
        band.fuse(y, row + radius);
        for (int64_t j = 1; j <= radius; ++j) {
          row[radius - j] = row[radius + mirrored(-j, p.width)];
          row[radius + p.width - 1 + j] = row[radius + mirrored(p.width - 1 + j, p.width)];
        }
        add_rows<T>(shifted, kernel, size, p.width, along + n * area + y * p.width);
      }
    }
  });
  if (!smooth) return;
  in_parallel(p.parallel, p.batch * bands, [&](TaskQueue& queue) {
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

BKD_DEFINE_KERNEL(cosine_distances, AnomalyMap)
BKD_DEFINE_KERNEL(cosine_distances_backward, AnomalyMap)
BKD_DEFINE_KERNEL(anomaly_map, AnomalyMap)

}  // namespace bkd
