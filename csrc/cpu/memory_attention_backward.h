// Sparse memory attention, backward: the weights are computed again. Rows go through in chunks: first a task owns a tile
// of queries, then a task owns a block of the memory's gradient, so that every sum has one order.
#pragma once

#include "memory_attention.h"

namespace bkd {
namespace {

// What the gradient of the memory needs of a chunk of rows, (I, pitch) each.
template <class T>
struct Chunk {
  int64_t pitch;
  T* read;    // the sparse weights
  T* by_dot;  // gradient by the dot products
  T* pulls;   // (tiles, I): what the items' norms take back, in units of an item over its square
};

// One panel. weights, cosine: of attend(). by_read: gradient by the sparse weights; becomes the gradient by the dot
// products. query_pull, item_pull: what the norms take back, in units of a vector over its square.
template <class T>
void attend_backward(const MemoryAttention<T>& p, const T* item_norms, const T* query_norms, const T* weights,
                     const T* cosine, T* sparse, T* by_read, T* query_pull, Vec<T>* item_pull) {
  using V = Vec<T>;
  constexpr int W = LANES<T>;
  const T delta = T(1e-12);
  alignas(64) T totals[NR<T>];
  prune<T>(p, weights, sparse, totals);
  for (int half = 0; half < 2; ++half) {
    const int64_t column = half * W;
    const V norms = load(query_norms + column), total = load(totals + column);
    V along = {};
    if (p.renormalize)
      for (int64_t i = 0; i < p.items; ++i) along += load(by_read + i * NR<T> + column) * load(sparse + i * NR<T> + column);
    V mean = {};
    for (int64_t i = 0; i < p.items; ++i) {
      const V w = load(weights + i * NR<T> + column), difference = w - p.threshold;
      const V above = larger<V>(difference, V{}) + delta;
      const V by_sparse = (load(by_read + i * NR<T> + column) - along) / total;
      const V slope = (above - delta) / above + w * delta / (above * above);  // of Eq. 9, where it is above
      const V by_weight = difference > V{} ? by_sparse * slope : V{};
      store(by_read + i * NR<T> + column, by_weight);
      mean += by_weight * w;
    }
    V pull = {};
    for (int64_t i = 0; i < p.items; ++i) {
      const V w = load(weights + i * NR<T> + column), value = load(cosine + i * NR<T> + column);
      const V by_cosine = w * (load(by_read + i * NR<T> + column) - mean) / p.temperature;
      const V product = norms * item_norms[i], epsilon = all(T(LEAST_NORMS));
      const V back = product > epsilon ? by_cosine * value : V{};  // a clamped norm is a constant
      pull += back;
      item_pull[i] += back;
      store(by_read + i * NR<T> + column, by_cosine / larger<V>(product, epsilon));
    }
    store(query_pull + column, pull);
  }
}

// What the norm of a vector takes back of its gradient.
template <class T>
void take_back(T pull, T norm, const T* vector, int64_t channels, T* gradient) {
  const T square = norm * norm, tiny = T(LEAST_NORMS * LEAST_NORMS);
  const T back = pull / (square > tiny ? square : tiny);
  for (int64_t c = 0; c < channels; ++c) gradient[c] -= back * vector[c];
}

template <class T>
void attention_tile_backward(const MemoryAttention<T>& p, const Items<T>& items, int64_t begin, int64_t count,
                             int64_t width, int64_t column, int64_t tile, const Chunk<T>& chunk) {
  const int64_t used = parts(count, NR<T>), channels = p.channels, panel = p.items * NR<T>;
  Scratch<T> queries(width * channels), grads(width * channels), norms(width), weights(width * p.items);
  Scratch<T> by_read(width * p.items), cosine(panel), sparse(panel), pull(width), item_pull(p.items * LANES<T>);
  auto* pulls = reinterpret_cast<Vec<T>*>(static_cast<T*>(item_pull));
  for (int64_t i = 0; i < p.items; ++i) pulls[i] = Vec<T>{};
  const T* query = p.query + begin * channels;
  turn_rows<T>(query, count, channels, queries);
  turn_rows<T>(p.grad + begin * channels, count, channels, grads);
  for (int64_t i = 0; i < used * NR<T>; ++i) norms[i] = i < count ? norm(query + i * channels, channels) : T(1);
  multiply<T>(p.items, channels, p.memory, queries, used, weights);
  multiply<T>(p.items, channels, p.memory, grads, used, by_read);
  for (int64_t i = 0; i < used; ++i) {
    attend<T>(p, items.norms, norms + i * NR<T>, weights + i * panel, cosine);
    attend_backward<T>(p, items.norms, norms + i * NR<T>, weights + i * panel, cosine, sparse, by_read + i * panel,
                       pull + i * NR<T>, pulls);
    if (chunk.read)
      for (int64_t item = 0; item < p.items; ++item)
        for (int64_t j = 0; j < least(NR<T>, count - i * NR<T>); ++j) {
          chunk.read[item * chunk.pitch + column + i * NR<T> + j] = sparse[item * NR<T> + j];
          chunk.by_dot[item * chunk.pitch + column + i * NR<T> + j] = by_read[i * panel + item * NR<T> + j];
        }
  }
  if (chunk.read)
    for (int64_t i = 0; i < p.items; ++i) chunk.pulls[tile * p.items + i] = lane_sum<T>(pulls[i]);
  if (!p.grad_query) return;
  multiply<T>(channels, p.items, items.turned, by_read, used, grads);
  T* result = p.grad_query + begin * channels;
  for (int64_t i = 0; i < count; i += NR<T>)
    transpose_block<T>(grads + i * channels, NR<T>, channels, least(NR<T>, count - i), result + i * channels, channels);
  for (int64_t i = 0; i < count; ++i)
    take_back(pull[i], norms[i], query + i * channels, channels, result + i * channels);
}

// Adds what a chunk of `rows` queries from `begin` on gives to one block of the memory's gradient.
template <class T>
void memory_block_backward(const MemoryAttention<T>& p, const Chunk<T>& chunk, int64_t begin, int64_t rows, int64_t item,
                           int64_t items, int64_t first, int64_t channels, T* panels, T* sums) {
  const int64_t pitch = rounded(channels, NR<T>);
  bool started = false;
  for (int64_t k = 0; k < rows; k += DEPTH) {
    const int64_t depth = least(DEPTH, rows - k);
    for (const T* factor : {chunk.read, chunk.by_dot}) {
      const T* from = (factor == chunk.read ? p.grad : p.query) + (begin + k) * p.channels + first;
      for (int64_t c = 0; c < channels; c += NR<T>)  // panels[channel / NR][row][channel % NR]
        for (int64_t r = 0; r < depth; ++r)
          std::memcpy(panels + c * depth + r * NR<T>, from + r * p.channels + c, least(NR<T>, channels - c) * sizeof(T));
      gemm<T>(items, depth, {factor + item * chunk.pitch + k, chunk.pitch, 1}, {panels, depth * NR<T>, NR<T>}, pitch / NR<T>, sums,
              pitch, started);
      started = true;
    }
  }
  for (int64_t i = 0; i < items; ++i) {
    T* to = p.grad_memory + (item + i) * p.channels + first;
    for (int64_t c = 0; c < channels; ++c) to[c] += sums[i * pitch + c];
  }
}

// grad_memory comes filled with zeros.
template <class T>
void memory_attention_backward(const MemoryAttention<T>& p) {
  constexpr int64_t ITEMS = 96, CHANNELS = 4 * NR<T>;
  const Items<T> items(p);
  const int64_t width = attention_rows(p, 3), rows = least(rounded(p.rows, width), rounded(1024, width));
  const int64_t tiles = rows / width, kept = p.grad_memory ? p.items * rows : 0;
  Scratch<T> read(kept), by_dot(kept), pulls(p.grad_memory ? p.items * tiles : 0), pull(p.items);
  const Chunk<T> chunk = {rows, p.grad_memory ? static_cast<T*>(read) : nullptr, by_dot, pulls};
  std::memset(pull, 0, p.items * sizeof(T));
  for (int64_t begin = 0; begin < p.rows; begin += rows) {
    const int64_t count = least(rows, p.rows - begin), used = parts(count, width);
    in_parallel(p.parallel, used, [&](Queue& queue) {
      for (int64_t task; (task = queue.next()) >= 0;)
        attention_tile_backward<T>(p, items, begin + task * width, least(width, count - task * width), width,
                                   task * width, task, chunk);
    });
    if (!p.grad_memory) continue;
    const int64_t across = parts(p.channels, CHANNELS);
    in_parallel(p.parallel, parts(p.items, ITEMS) * across, [&](Queue& queue) {
      Scratch<T> panels(DEPTH * CHANNELS), sums(ITEMS * CHANNELS);
      for (int64_t task; (task = queue.next()) >= 0;) {
        const int64_t item = task / across * ITEMS, first = task % across * CHANNELS;
        memory_block_backward<T>(p, chunk, begin, count, item, least(ITEMS, p.items - item), first,
                                 least(CHANNELS, p.channels - first), panels, sums);
      }
    });
    for (int64_t tile = 0; tile < used; ++tile)
      for (int64_t i = 0; i < p.items; ++i) pull[i] += pulls[tile * p.items + i];
  }
  if (!p.grad_memory) return;
  for (int64_t i = 0; i < p.items; ++i)
    take_back(pull[i], items.norms[i], p.memory + i * p.channels, p.channels, p.grad_memory + i * p.channels);
}

}  // namespace
}  // namespace bkd
