// The rows of a bank that are nearest to each query. Products of low precision leave a few candidates, and the exact
// products of these decide: of the `count` best rows by rounded scores the last bounds the true ones from below, so
// that every row whose rounded score is two errors below it is out.
#include "nearest_rows.h"

#include "simd.h"
#include "widen.h"
#include "work.h"

namespace bkd {
namespace {

constexpr int64_t QUERIES = 16;  // of a task

// The rows with the largest scores, in falling order; of equal scores the first row is in front.
template <class T>
struct Largest {
  T score[MAX_NEAREST];
  int64_t index[MAX_NEAREST];
  int64_t count;

  BKD_INLINE void reset(int64_t rows) {
    count = rows;
    for (int64_t i = 0; i < count; ++i) score[i] = -T(INFINITY), index[i] = i;
  }
  BKD_INLINE T last() const { return score[count - 1]; }
  BKD_INLINE void insert(T value, int64_t row) {
    if (!(value > last())) return;
    int64_t i = count - 1;
    for (; i > 0 && value > score[i - 1]; --i) score[i] = score[i - 1], index[i] = index[i - 1];
    score[i] = value, index[i] = row;
  }
};

// call(row) for every row whose score is at least `bound`, which may rise meanwhile; scores fill up whole vectors.
template <class T, class Call>
BKD_INLINE void for_scores(const T* scores, int64_t rows, const T& bound, const Call& call) {
  constexpr int W = LANES<T>;
  for (int64_t j = 0; j < rows; j += W) {
    const Vec<T> score = load(scores + j);
    unsigned lanes = nonzero<T>(score >= all(bound) ? all(T(1)) : Vec<T>{});
    for (; lanes; lanes &= lanes - 1) call(j + __builtin_ctz(lanes));
  }
}

template <class T>
void nearest_rows(const NearestRows<T>& p) {
  constexpr int W = LANES<T>;
  const int64_t pitch = rounded(p.bank_rows, W);
  T largest_square = 0;
  for (int64_t j = 0; j < p.bank_rows; ++j)
    largest_square = p.half_squares[j] > largest_square ? p.half_squares[j] : largest_square;
  const T norm = std::sqrt(2 * largest_square);
  in_parallel(p.parallel, parts(p.rows, QUERIES), [&](TaskQueue& queue) {
    Scratch<T> scores(pitch);
    Largest<T> rough, exact;
    for (int64_t task; (task = queue.next()) >= 0;)
      for (int64_t r = task * QUERIES; r < min((task + 1) * QUERIES, p.rows); ++r) {
        const T* query = p.query + r * p.channels;
        widen<T>(p.products + r * p.bank_rows * p.bytes, p.numbers, p.bank_rows, scores);
        for (int64_t j = 0; j < p.bank_rows; ++j) scores[j] -= p.half_squares[j];
        for (int64_t j = p.bank_rows; j < pitch; ++j) scores[j] = T(NAN);
        rough.reset(p.count), exact.reset(p.count);
        T bound = rough.last();
        for_scores<T>(scores, p.bank_rows, bound, [&](int64_t j) {
          rough.insert(scores[j], j);
          bound = rough.last();
        });
        bound -= 2 * p.error * norm * std::sqrt(dot(query, query, p.channels));
        for_scores<T>(scores, p.bank_rows, bound, [&](int64_t j) {
          exact.insert(dot(query, p.bank + j * p.channels, p.channels) - p.half_squares[j], j);
        });
        for (int64_t i = 0; i < p.count; ++i) p.index[r * p.count + i] = exact.index[i];
      }
  });
}

}  // namespace

BKD_DEFINE_KERNEL(nearest_rows, NearestRows)

}  // namespace bkd
