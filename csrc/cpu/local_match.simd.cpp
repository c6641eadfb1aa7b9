// Matching in a window: rows of support images are widened once and stay in cache for all rows of the query that they
// are compared with.
#include "local_match.h"

#include "simd.h"
#include "work.h"

namespace bkd {
namespace {

constexpr int64_t MATCH_COLUMNS = 64;  // of a task at most
constexpr int MATCH_PIXELS = 4;        // whose sums of squares are added up together
constexpr int MATCH_MOVES = 3;         // to the side, that are compared together

// to[0..count) = numbers of 16 bits as floats.
inline void widen_halves(const uint16_t* from, int64_t count, float* to) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= count; i += 16)
    store(to + i, static_cast<Vec<float>>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i)))));
#endif
#if defined(__F16C__)
  for (; i + 8 <= count; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
#endif
  for (; i < count; ++i) {
    // Exponent and fraction in their places make 2^-112 of the number, subnormal or not; infinity and NaN are set apart.
    const uint32_t bits = (from[i] & 0x7fffu) << 13, sign = (from[i] & 0x8000u) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    value *= 5.192296858534828e33f;  // 2^112
    uint32_t result;
    std::memcpy(&result, &value, sizeof result);
    if (bits >= 0x0f800000u) result = bits | 0x7f800000u;
    result |= sign;
    std::memcpy(to + i, &result, sizeof result);
  }
}
inline void widen_bfloats(const uint16_t* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = uint32_t(from[i]) << 16;
    std::memcpy(to + i, &bits, sizeof bits);
  }
}

template <class T>
void widen(const void* from, Numbers type, int64_t count, T* to) {
  if constexpr (std::is_same<T, float>::value) {
    if (type == Numbers::Half) return widen_halves(static_cast<const uint16_t*>(from), count, to);
    if (type == Numbers::BFloat) return widen_bfloats(static_cast<const uint16_t*>(from), count, to);
  }
  std::memcpy(to, from, count * sizeof(T));
}

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

// sums[move * stride + pixel] = |query[pixel] - support[pixel + move]|^2 of pixels and moves that follow one another;
// pixels lie `pitch` apart, a multiple of the lanes.
template <class T, int Pixels, int Moves>
BKD_INLINE void compare(const T* query, const T* support, int64_t pitch, T* sums, int64_t stride) {
  constexpr int W = LANES<T>;
  Vec<T> sum[Moves][Pixels] = {};
  for (int64_t c = 0; c < pitch; c += W) {
#pragma GCC unroll 8
    for (int s = 0; s < Pixels + Moves - 1; ++s) {
      const Vec<T> other = load(support + s * pitch + c);
#pragma GCC unroll 4
      for (int move = 0; move < Moves; ++move) {
        const int pixel = s - move;
        if (pixel < 0 || pixel >= Pixels) continue;
        const Vec<T> difference = load(query + pixel * pitch + c) - other;
        sum[move][pixel] += difference * difference;
      }
    }
  }
#pragma GCC unroll 4
  for (int move = 0; move < Moves; ++move) {
    if constexpr (Pixels == 4)
      four_sums<T>(sum[move], sums + move * stride);
    else
      sums[move * stride] = lane_sum<T>(sum[move][0]);
  }
}

// The same for pixels from `pixel` on and all moves of a window: rows[dy + radius] has the pixels from -radius on, or
// is null where the image has no such row.
template <class T, int Pixels>
void compare_window(const T* query, const T* const* rows, int64_t pixel, int64_t radius, int64_t pitch, T* sums,
                    int64_t stride) {
  const int64_t side = 2 * radius + 1;
  query += pixel * pitch, sums += pixel;
  for (int64_t y = 0; y < side; ++y) {
    if (!rows[y]) continue;
    T* to = sums + y * side * stride;
    int64_t x = 0;
    for (; x + MATCH_MOVES <= side; x += MATCH_MOVES)
      compare<T, Pixels, MATCH_MOVES>(query, rows[y] + (pixel + x) * pitch, pitch, to + x * stride, stride);
    for (; x < side; ++x) compare<T, Pixels, 1>(query, rows[y] + (pixel + x) * pitch, pitch, to + x * stride, stride);
  }
}

// The least of the sums of each pixel, and the move that gives it; sums[(dy, dx)][pixel]. NaN loses to any number.
template <class T>
void choose(const LocalMatch<T>& p, const T* sums, int64_t stride, int64_t count, T* distance, T* y, T* x) {
  using V = Vec<T>;
  constexpr int W = LANES<T>;
  const int64_t side = 2 * p.radius + 1;
  for (int64_t i = 0; i < count; i += W) {
    V best = all(T(NAN)), best_y = {}, best_x = {};
    for (int64_t m = 0; m < side * side; ++m) {
      const Move move = p.moves[m];
      const V sum = load(sums + ((move.y + p.radius) * side + move.x + p.radius) * stride + i);
      const auto better = (sum == sum) & ~(best <= sum);
      best = better ? sum : best;
      best_y = better ? all(T(move.y)) : best_y;
      best_x = better ? all(T(move.x)) : best_x;
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
  const int64_t columns = least(MATCH_COLUMNS, p.width), across = parts(p.width, columns);
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
      const int64_t n = pair / p.shots, count = least(columns, p.width - left), bottom = least(top + rows, p.height);
      // Row y of the support, with what the window needs on either side, NaN where there is nothing.
      const int64_t begin = most(left - p.radius, 0), end = least(left + count + p.radius, p.width);
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
      for (int64_t y = most(top - p.radius, 0); y < least(top + p.radius, p.height); ++y) fetch(y);
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
            compare_window<T, MATCH_PIXELS>(query, rows, least(x, count - MATCH_PIXELS), p.radius, pitch, sums, stride);
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
