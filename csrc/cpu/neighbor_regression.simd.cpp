// Rows as combinations of their neighbours: differences, their Gram matrix and its solution stay in the first cache.
#include "neighbor_regression.h"

#include "simd.h"
#include "widen.h"
#include "work.h"

namespace bkd {
namespace {

constexpr int64_t ROWS = 32;  // of a task
constexpr int FEW = 6;        // neighbours whose products are summed up in registers

// gram[i * count + j] = <apart[i], apart[j]> for j <= i; rows lie `pitch` apart, a multiple of the lanes.
template <class T, int Count>
BKD_INLINE void few_products(const T* apart, int64_t pitch, T* gram) {
  constexpr int W = LANES<T>, PAIRS = Count * (Count + 1) / 2;
  Vec<T> sum[(PAIRS + 3) / 4 * 4] = {};
  for (int64_t c = 0; c < pitch; c += W) {
    Vec<T> row[Count];
#pragma GCC unroll 8
    for (int i = 0; i < Count; ++i) row[i] = load(apart + i * pitch + c);
    int pair = 0;
#pragma GCC unroll 8
    for (int i = 0; i < Count; ++i)
#pragma GCC unroll 8
      for (int j = 0; j <= i; ++j) sum[pair++] += row[i] * row[j];
  }
  T total[(PAIRS + 3) / 4 * 4];
  for (int pair = 0; pair < PAIRS; pair += 4) four_sums<T>(sum + pair, total + pair);
  int pair = 0;
  for (int i = 0; i < Count; ++i)
    for (int j = 0; j <= i; ++j) gram[i * Count + j] = total[pair++];
}

template <class T, int Count = FEW>
void products(const T* apart, int64_t pitch, int64_t count, T* gram) {
  if constexpr (Count > 0) {
    if (count == Count) return few_products<T, Count>(apart, pitch, gram);
    if (count < Count) return products<T, Count - 1>(apart, pitch, count, gram);
  }
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = 0; j <= i; ++j) gram[i * count + j] = dot(apart + i * pitch, apart + j * pitch, pitch);
}

// weight = gram^-1 1, by Cholesky's factors, which replace the lower half of gram.
template <class T>
void solve(T* gram, int64_t count, T* weight) {
  for (int64_t i = 0; i < count; ++i) {
    T* row = gram + i * count;
    for (int64_t j = 0; j <= i; ++j) {
      const T* other = gram + j * count;
      T value = row[j];
      for (int64_t k = 0; k < j; ++k) value -= row[k] * other[k];
      row[j] = j < i ? value / other[j] : std::sqrt(value);
    }
    T value = 1;
    for (int64_t k = 0; k < i; ++k) value -= row[k] * weight[k];
    weight[i] = value / row[i];
  }
  for (int64_t i = count - 1; i >= 0; --i) {
    for (int64_t k = i + 1; k < count; ++k) weight[i] -= gram[k * count + i] * weight[k];
    weight[i] /= gram[i * count + i];
  }
}

template <class T>
void weights_of(const NeighborRegression<T>& p, T* gram, T* weight) {
  const int64_t count = p.neighbors;
  T mean = 0, sum = 0;
  for (int64_t i = 0; i < count; ++i) mean += gram[i * count + i];
  mean /= count;
  const T scale = mean < T(1e-12) ? T(1e-12) : mean;  // NaN stays
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t j = 0; j <= i; ++j) gram[i * count + j] /= scale;
    gram[i * count + i] += p.ridge;
  }
  solve<T>(gram, count, weight);
  for (int64_t i = 0; i < count; ++i) sum += weight[i];
  for (int64_t i = 0; i < count; ++i) weight[i] /= sum;
}

template <class T>
void neighbor_regression(const NeighborRegression<T>& p) {
  constexpr int W = LANES<T>;
  const int64_t pitch = rounded(p.channels, W), count = p.neighbors;
  in_parallel(p.parallel, parts(p.rows, ROWS), [&](TaskQueue& queue) {
    Scratch<T> apart(count * pitch), gram(count * count), weight(count), own(pitch), result(pitch);
    for (int64_t c = p.channels; c < pitch; ++c) own[c] = 0;
    for (int64_t task; (task = queue.next()) >= 0;)
      for (int64_t row = task * ROWS; row < min((task + 1) * ROWS, p.rows); ++row) {
        std::memcpy(own, p.query + row * p.channels, p.channels * sizeof(T));
        for (int64_t k = 0; k < count; ++k) {
          T* to = apart + k * pitch;
          widen<T>(p.bank + p.neighbor[row * count + k] * p.channels * p.bytes, p.numbers, p.channels, to);
          for (int64_t c = p.channels; c < pitch; ++c) to[c] = 0;
          for (int64_t c = 0; c < pitch; c += W) store(to + c, load(to + c) - load(own + c));
        }
        products<T>(apart, pitch, count, gram);
        weights_of<T>(p, gram, weight);
        // Weights sum to one: the combination is the row itself and the weighted differences.
        for (int64_t c = 0; c < pitch; c += W) {
          Vec<T> sum = load(own + c);
          for (int64_t k = 0; k < count; ++k) sum += weight[k] * load(apart + k * pitch + c);
          store(result + c, sum);
        }
        std::memcpy(p.output + row * p.channels, result, p.channels * sizeof(T));
      }
  });
}

}  // namespace

BKD_DEFINE_KERNEL(neighbor_regression, NeighborRegression)

}  // namespace bkd
