// Matching in a window: rows of support images are widened once and stay in cache for all rows of the query that they
// are compared with.
#include "local_match.h"

#include "simd.h"
#include "widen.h"
#include "work.h"

namespace bkd {
namespace {

constexpr int64_t MATCH_COLUMNS = 64;   // of a task at most
constexpr int MATCH_PIXELS = 4;         // whose sums of squares are added up together
constexpr int MATCH_DISPLACEMENTS = 3;  // to the side, that are compared together

// The channels of each pixel are filled up with zeros to `pitch`, a multiple of the lanes.
template <class T>
void spread(const T* from, int64_t count, int64_t channels, int64_t pitch, T* to) {
  constexpr int W = LANES<T>;
  const int64_t whole = channels / W * W;
  for (int64_t i = 0; i < count; ++i, from += channels, to += pitch) {
    for (int64_t c = 0; c < whole; c += W) store(to + c, load(from + c));
    store(to + whole, load_part(from + whole, channels - whole));
  }
}

template <class T>
void fill(T* to, int64_t count, T value) {
  for (int64_t i = 0; i < count; ++i) to[i] = value;
}

// sums[displacement * stride + pixel] = |query[pixel] - support[pixel + displacement]|^2 of pixels and displacements
// that follow one another; pixels lie `pitch` apart, a multiple of the lanes.
template <class T, int Pixels, int Displacements>
BKD_INLINE void compare(const T* query, const T* support, int64_t pitch, T* sums, int64_t stride) {
  constexpr int W = LANES<T>;
  Vec<T> sum[Displacements][Pixels] = {};
  for (int64_t c = 0; c < pitch; c += W) {
#pragma GCC unroll 8
    for (int s = 0; s < Pixels + Displacements - 1; ++s) {
      const Vec<T> other = load(support + s * pitch + c);
#pragma GCC unroll 4
      for (int displacement = 0; displacement < Displacements; ++displacement) {
        const int pixel = s - displacement;
        if (pixel < 0 || pixel >= Pixels) continue;
        const Vec<T> difference = load(query + pixel * pitch + c) - other;
        sum[displacement][pixel] += difference * difference;
      }
    }
  }
#pragma GCC unroll 4
  for (int displacement = 0; displacement < Displacements; ++displacement) {
    if constexpr (Pixels == 4)
      four_sums<T>(sum[displacement], sums + displacement * stride);
    else
      sums[displacement * stride] = lane_sum<T>(sum[displacement][0]);
  }
}

// The same for pixels from `pixel` on and all displacements of a window: rows[dy + radius] has the pixels from -radius
// on, or is null where the image has no such row.
template <class T, int Pixels>
void compare_window(const T* query, const T* const* rows, int64_t pixel, int64_t radius, int64_t pitch, T* sums,
                    int64_t stride) {
  const int64_t side = 2 * radius + 1;
  query += pixel * pitch, sums += pixel;
  for (int64_t y = 0; y < side; ++y) {
    if (!rows[y]) continue;
    T* to = sums + y * side * stride;
    int64_t x = 0;
    for (; x + MATCH_DISPLACEMENTS <= side; x += MATCH_DISPLACEMENTS)
      compare<T, Pixels, MATCH_DISPLACEMENTS>(query, rows[y] + (pixel + x) * pitch, pitch, to + x * stride, stride);
    for (; x < side; ++x) compare<T, Pixels, 1>(query, rows[y] + (pixel + x) * pitch, pitch, to + x * stride, stride);
  }
}

// The smallest of the sums of each pixel, and the displacement that gives it; sums[(dy, dx)][pixel]. NaN loses to any
// number.
template <class T>
void choose(const LocalMatch<T>& p, const T* sums, int64_t stride, int64_t count, T* distance, T* y, T* x) {
  using V = Vec<T>;
  constexpr int W = LANES<T>;
  const int64_t side = 2 * p.radius + 1;
  for (int64_t i = 0; i < count; i += W) {
    V best = all(T(NAN)), best_y = {}, best_x = {};
    for (int64_t m = 0; m < side * side; ++m) {
      const Displacement displacement = p.window[m];
      const V sum = load(sums + ((displacement.y + p.radius) * side + displacement.x + p.radius) * stride + i);
      const auto better = (sum == sum) & ~(best <= sum);
      best = better ? sum : best;
      best_y = better ? all(T(displacement.y)) : best_y;
      best_x = better ? all(T(displacement.x)) : best_x;
    }
    best /= all(T(p.channels));
    const int64_t lanes = count - i;
    if (lanes >= W) {
      store(distance + i, best), store(y + i, best_y), store(x + i, best_x);
    } else {
      store_part(distance + i, best, lanes), store_part(y + i, best_y, lanes), store_part(x + i, best_x, lanes);
    }
  }
}

// A task: some rows and columns of a query, and one of the images that it is matched with.
template <class T>
void local_match(const LocalMatch<T>& p) {
  const int64_t side = 2 * p.radius + 1, pitch = rounded(p.channels, LANES<T>), plane = p.height * p.width;
  const int64_t columns = min(MATCH_COLUMNS, p.width), across = parts(p.width, columns);
  const bool whole = pitch == p.channels;
  const int64_t pairs = p.batch * p.shots * across;
  int64_t rows = p.height;
  while (rows > 4 && pairs * parts(p.height, rows) < 4 * p.threads) rows = parts(rows, 2);
  const int64_t down = parts(p.height, rows);
  in_parallel(p.parallel, pairs * down, [&](TaskQueue& queue) {
    const int64_t wide = columns + 2 * p.radius, stride = rounded(columns, LANES<T>);
    Scratch<T> ring(side * wide * pitch), flat(wide * p.channels), own(columns * pitch), sums(side * side * stride);
    for (int64_t task; (task = queue.next()) >= 0;) {
      const int64_t pair = task / (across * down), left = task / down % across * columns, top = task % down * rows;
      const int64_t n = pair / p.shots, count = min(columns, p.width - left), bottom = min(top + rows, p.height);
      // Row y of the support, with what the window needs on either side, NaN where there is nothing.
      const int64_t begin = max(left - p.radius, 0), end = min(left + count + p.radius, p.width);
      auto row_of = [&](int64_t y) { return ring + (y + side) % side * wide * pitch; };
      auto fetch = [&](int64_t y) {
        T* row = row_of(y);
        const int64_t first = begin - (left - p.radius), last = first + end - begin;
        fill<T>(row, first * pitch, T(NAN));
        fill<T>(row + last * pitch, (count + 2 * p.radius - last) * pitch, T(NAN));
        T* to = row + first * pitch;
        widen<T>(p.image(pair, y * p.width + begin), p.numbers, (end - begin) * p.channels, whole ? to : flat);
        if (!whole) spread<T>(flat, end - begin, p.channels, pitch, to);
      };
      for (int64_t y = max(top - p.radius, 0); y < min(top + p.radius, p.height); ++y) fetch(y);
      for (int64_t y = top; y < bottom; ++y) {
        if (y + p.radius < p.height) fetch(y + p.radius);
        const T* query = p.query + ((n * p.height + y) * p.width + left) * p.channels;
        if (!whole) {
          spread<T>(query, count, p.channels, pitch, own);
          query = own;
        }
        const T* rows[2 * MAX_MATCH_RADIUS + 1];
        for (int64_t i = 0; i < side; ++i) {
          const int64_t from = y + i - p.radius;
          rows[i] = from < 0 || from >= p.height ? nullptr : row_of(from);
          if (!rows[i]) fill<T>(sums + i * side * stride, side * stride, T(NAN));
        }
        if (count < MATCH_PIXELS)
          for (int64_t x = 0; x < count; ++x) compare_window<T, 1>(query, rows, x, p.radius, pitch, sums, stride);
        else
          for (int64_t x = 0; x < count; x += MATCH_PIXELS)  // the last ones are compared twice
            compare_window<T, MATCH_PIXELS>(query, rows, min(x, count - MATCH_PIXELS), p.radius, pitch, sums, stride);
        const int64_t at = y * p.width + left;
        T* displacement = p.displacement + 2 * pair * plane + at;
        choose<T>(p, sums, stride, count, p.distance + pair * plane + at, displacement, displacement + plane);
      }
    }
  });
}

}  // namespace

BKD_DEFINE_KERNEL(local_match, LocalMatch)

}  // namespace bkd
