// The steps of sparse memory attention that forward and backward share.
#pragma once

#include "../common/shrink.h"
#include "gemm.h"
#include "memory_attention.h"
#include "work.h"

namespace bkd {
namespace {

constexpr int64_t DEPTH = 512;  // of a matrix product at a time: a panel of it fits the first cache

template <class T>
T norm(const T* from, int64_t count) {
  return std::sqrt(dot(from, from, count));
}

// The norms of the memory's items, and one over them.
template <class T>
struct ItemNorms {
  explicit ItemNorms(int64_t items) : norms(items), inverses(items) {}
  BKD_INLINE void set(int64_t i, T norm) const { norms[i] = norm, inverses[i] = 1 / norm; }
  Scratch<T> norms, inverses;  // (I)
};

// What all tiles of one call use of the memory.
template <class T>
struct Items : ItemNorms<T> {
  explicit Items(const MemoryAttention<T>& p) : ItemNorms<T>(p.items), transposed(p.items * p.channels) {
    constexpr int64_t STRIP = 64;
    in_parallel(p.parallel, parts(p.items, STRIP), [&](TaskQueue& queue) {
      for (int64_t task; (task = queue.next()) >= 0;) {
        const int64_t begin = task * STRIP, count = min(STRIP, p.items - begin);
        transpose_block<T>(p.memory + begin * p.channels, p.channels, count, p.channels, transposed + begin, p.items);
        for (int64_t i = begin; i < begin + count; ++i) this->set(i, norm(p.memory + i * p.channels, p.channels));
      }
    });
  }
  Scratch<T> transposed;  // (C, I)
};

// One over the product of the norms of NR / 2 queries and an item, the product being at least MIN_NORMS.
template <class T>
struct InverseNorms {
  explicit InverseNorms(const T* query_norms) : norms(load(query_norms)), inverses(all(T(1)) / norms) {}
  BKD_INLINE Vec<T> of(const ItemNorms<T>& items, int64_t i) const {
    return regular(items, i) ? inverses * items.inverses[i] : all(T(1 / MIN_NORMS));
  }
  BKD_INLINE auto regular(const ItemNorms<T>& items, int64_t i) const {
    return norms * items.norms[i] > all(T(MIN_NORMS));
  }
  const Vec<T> norms, inverses;
};

// Queries at a time: their weights, once or (backward) three times, stay in the second cache. The number of threads has
// no part in it, so that it has none in the result.
template <class T>
int64_t attention_rows(const MemoryAttention<T>& p, int64_t copies) {
  int64_t rows = 128;
  while (rows > NR<T> &&
         (rows * (p.items * copies + p.channels) * int64_t(sizeof(T)) > 320 * 1024 || parts(p.rows, rows) < 16))
    rows /= 2;
  return rounded(rows, NR<T>);
}

// panels[row / NR][channel][row % NR]; rows that fill up the last panel are zero.
template <class T>
void transpose_rows(const T* from, int64_t rows, int64_t channels, T* panels) {
  for (int64_t i = 0; i < rows; i += NR<T>) {
    T* panel = panels + i * channels;
    const int64_t wide = min(NR<T>, rows - i);
    if (wide < NR<T>) std::memset(panel, 0, channels * NR<T> * sizeof(T));
    transpose_block<T>(from + i * channels, channels, wide, channels, panel, NR<T>);
  }
}

// Product of a matrix's rows with panels of any depth; the result is in panels too: to[panel][row][NR].
template <class T>
void multiply(int64_t rows, int64_t depth, const T* a, const T* panels, int64_t count, T* to) {
  for (int64_t k = 0; k < depth; k += DEPTH)
    for (int64_t r = 0; r < rows; r += MR)
      for (int64_t i = 0; i < count; ++i)
        gemm<T>(min(MR, rows - r), min(DEPTH, depth - k), {a + r * depth + k, depth, 1},
                {panels + (i * depth + k) * NR<T>, 0, NR<T>}, 1, to + (i * rows + r) * NR<T>, NR<T>, k > 0);
}

// The softmax of one panel: values[item][NR] are dot products and become weights (Eq. 6 and 7). cosine: kept if not
// null.
template <class T>
void attend(const MemoryAttention<T>& p, const ItemNorms<T>& items, const T* query_norms, T* values, T* cosine) {
  using V = Vec<T>;
  constexpr int W = LANES<T>;
  const T scale = 1 / p.temperature;
  for (int half = 0; half < 2; ++half) {
    const InverseNorms<T> inverse(query_norms + half * W);
    V maximum = all(T(-INFINITY));
    T* column = values + half * W;
    for (int64_t i = 0; i < p.items; ++i) {
      const V value = load(column + i * NR<T>) * inverse.of(items, i);
      if (cosine) store(cosine + i * NR<T> + half * W, value);
      store(column + i * NR<T>, value);
      maximum = max_lanes<V>(maximum, value);
    }
    V total = {};
    for (int64_t i = 0; i < p.items; ++i) {
      const V value = exponential((load(column + i * NR<T>) - maximum) * scale);
      store(column + i * NR<T>, value);
      total += value;
    }
    const V factor = all(T(1)) / total;
    for (int64_t i = 0; i < p.items; ++i) store(column + i * NR<T>, load(column + i * NR<T>) * factor);
  }
}

// Eq. 9 and the renormalisation, from weights to sparse weights; totals: what a row was divided by (1 if it was not).
// Returns how many of the panel's sparse weights are not zero.
template <class T>
int64_t prune(const MemoryAttention<T>& p, const T* weights, T* sparse, T* totals) {
  using V = Vec<T>;
  constexpr int W = LANES<T>;
  int64_t kept = 0;
  for (int half = 0; half < 2; ++half) {
    V total = {}, count = {};
    for (int64_t i = 0; i < p.items; ++i) {
      const V value = shrink<V>(load(weights + i * NR<T> + half * W), all(p.threshold));
      store(sparse + i * NR<T> + half * W, value);
      total += value;
      count += value != V{} ? all(T(1)) : V{};
    }
    kept += static_cast<int64_t>(lane_sum<T>(count));
    total = p.renormalize ? (total > V{} ? total : all(T(1))) : all(T(1));
    store(totals + half * W, total);
    const V factor = all(T(1)) / total;
    if (p.renormalize)
      for (int64_t i = 0; i < p.items; ++i)
        store(sparse + i * NR<T> + half * W, load(sparse + i * NR<T> + half * W) * factor);
  }
  return kept;
}

// A weighted sum of rows of a matrix, without those whose weight is zero.
template <class T>
struct Terms {
  T* weights;
  int32_t* rows;
  int64_t count;
  BKD_INLINE void add(T weight, int64_t row) {
    weights[count] = weight;
    rows[count++] = static_cast<int32_t>(row);
  }
};

// Buffers for a number of such sums, of `capacity` rows at most.
template <class T>
struct Selection {
  Selection(int64_t sums, int64_t rows) : weights(sums * rows), indices(sums * rows), capacity(rows) {}
  Terms<T> empty(int64_t sum) const { return {weights + sum * capacity, indices + sum * capacity, 0}; }
  Scratch<T> weights;
  Scratch<int32_t> indices;
  int64_t capacity;
};

// The sums of one panel of weights[row][NR], one a column.
template <class T>
void collect_panel(const T* weights, int64_t rows, const Selection<T>& selection, Terms<T>* terms) {
  for (int64_t j = 0; j < NR<T>; ++j) terms[j] = selection.empty(j);
  for (int64_t r = 0; r < rows; ++r)
    for (int first = 0; first < NR<T>; first += LANES<T>)
      for (unsigned bits = nonzero<T>(load(weights + r * NR<T> + first)); bits; bits &= bits - 1) {
        const int j = first + __builtin_ctz(bits);
        terms[j].add(weights[r * NR<T> + j], r);
      }
}
// The sum of weights that lie in a row.
template <class T>
Terms<T> collect_row(const T* weights, int64_t rows, const Selection<T>& selection) {
  Terms<T> terms = selection.empty(0);
  int64_t r = 0;
  for (; r + LANES<T> <= rows; r += LANES<T>)
    for (unsigned bits = nonzero<T>(load(weights + r)); bits; bits &= bits - 1) {
      const int64_t at = r + __builtin_ctz(bits);
      terms.add(weights[at], at);
    }
  for (; r < rows; ++r)
    if (weights[r] != 0) terms.add(weights[r], r);
  return terms;
}

// to[0..Vectors LANES) = a sum; or the first `lanes` of them (0 = all).
template <class T, int Vectors>
void weigh_vectors(const Terms<T>& terms, const T* from, int64_t stride, int64_t lanes, T* to) {
  constexpr int W = LANES<T>;
  Vec<T> sum[Vectors] = {};
  for (int64_t k = 0; k < terms.count; ++k) {
    const T weight = terms.weights[k];
    const T* row = from + terms.rows[k] * stride;
    if (Vectors == 1 && lanes) {
      sum[0] += weight * load_part(row, lanes);
      continue;
    }
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) sum[v] += weight * load(row + v * W);
  }
  if (Vectors == 1 && lanes) return store_part(to, sum[0], lanes);
  for (int v = 0; v < Vectors; ++v) store(to + v * W, sum[v]);
}
// The same for any number of columns, in as few passes over the terms as registers allow.
template <class T, int Vectors = 8>
void weigh_rows(const Terms<T>& terms, const T* from, int64_t stride, int64_t columns, T* to) {
  constexpr int64_t WIDE = Vectors * LANES<T>;
  int64_t c = 0;
  for (; c + WIDE <= columns; c += WIDE) weigh_vectors<T, Vectors>(terms, from + c, stride, 0, to + c);
  if (c == columns) return;
  if constexpr (Vectors > 1)
    weigh_rows<T, Vectors / 2>(terms, from + c, stride, columns - c, to + c);
  else
    weigh_vectors<T, 1>(terms, from + c, stride, columns - c, to + c);
}

// Whether `kept` of `count` products of a matrix are cheaper one by one than all of them at once: one then costs its
// vectors and a start, and to find them a few steps a vector of weights. speed: how many times as fast as products of T
// all of them are.
template <class T>
bool few(int64_t kept, int64_t count, int64_t channels, int64_t speed = 1) {
  const int64_t vectors = parts(channels, LANES<T>);
  return speed * (kept * (vectors + 12) + 3 * parts(count, LANES<T>)) < count * vectors;
}

}  // namespace
}  // namespace bkd
