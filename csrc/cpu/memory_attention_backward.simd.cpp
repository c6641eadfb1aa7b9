// Sparse memory attention, backward: the weights are computed again. Rows go through in chunks: first a task owns a tile
// of queries, then a task owns a block of the memory's gradient, so that every sum has one order.
#include "memory_attention.h"

#include "attention.h"

namespace bkd {
namespace {

// What the gradient of the memory needs of a chunk of rows, (I, pitch) each.
template <class T>
struct Chunk {
  int64_t pitch;
  T* read;    // the sparse weights
  T* by_dot;  // gradient by the dot products
  T* pulls;   // (tiles, I): what the items' norms take back, in units of an item over its square
  int64_t* kept;  // (tiles): how many sparse weights are not zero
};

// One panel. weights, cosine: of attend(); sparse, totals: of prune(). by_read: gradient by the sparse weights; becomes the
// gradient by the dot products. query_pull, item_pull: what the norms take back, in units of a vector over its square.
template <class T>
void attend_backward(const MemoryAttention<T>& p, const Items<T>& items, const T* query_norms, const T* weights,
                     const T* cosine, const T* sparse, const T* totals, T* by_read, T* query_pull, Vec<T>* item_pull) {
  using V = Vec<T>;
  constexpr int W = LANES<T>;
  const T delta = T(1e-12), scale = 1 / p.temperature;
  for (int half = 0; half < 2; ++half) {
    const int64_t column = half * W;
    const InverseNorms<T> inverse(query_norms + column);
    const V factor = all(T(1)) / load(totals + column);
    V along = {};
    if (p.renormalize)
      for (int64_t i = 0; i < p.items; ++i) along += load(by_read + i * NR<T> + column) * load(sparse + i * NR<T> + column);
    V mean = {};
    for (int64_t i = 0; i < p.items; ++i) {
      const V w = load(weights + i * NR<T> + column), difference = w - p.threshold;
      const V above = larger<V>(difference, V{}) + delta, one_over = all(T(1)) / above;
      const V by_sparse = (load(by_read + i * NR<T> + column) - along) * factor;
      const V slope = ((above - delta) + w * delta * one_over) * one_over;  // of Eq. 9, where it is above
      const V by_weight = difference > V{} ? by_sparse * slope : V{};
      store(by_read + i * NR<T> + column, by_weight);
      mean += by_weight * w;
    }
    V pull = {};
    for (int64_t i = 0; i < p.items; ++i) {
      const V w = load(weights + i * NR<T> + column), value = load(cosine + i * NR<T> + column);
      const V by_cosine = w * (load(by_read + i * NR<T> + column) - mean) * scale;
      const V back = inverse.regular(items, i) ? by_cosine * value : V{};  // a clamped norm is a constant
      pull += back;
      item_pull[i] += back;
      store(by_read + i * NR<T> + column, by_cosine * inverse.of(items, i));
    }
    store(query_pull + column, pull);
  }
}

// by_read where the sparse weights are not zero, and zero elsewhere: one dot product each. grad: rows of the panel.
template <class T>
void read_backward(const MemoryAttention<T>& p, const T* sparse, const T* grad, int64_t rows, T* by_read) {
  std::memset(by_read, 0, p.items * NR<T> * sizeof(T));
  for (int64_t i = 0; i < p.items; ++i)
    for (int64_t j = 0; j < rows; ++j)
      if (sparse[i * NR<T> + j] != 0)
        by_read[i * NR<T> + j] = dot(p.memory + i * p.channels, grad + j * p.channels, p.channels);
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
  alignas(64) T totals[NR<T>];
  auto* pulls = reinterpret_cast<Vec<T>*>(static_cast<T*>(item_pull));
  for (int64_t i = 0; i < p.items; ++i) pulls[i] = Vec<T>{};
  const T *query = p.query + begin * channels, *grad = p.grad + begin * channels;
  turn_rows<T>(query, count, channels, queries);
  for (int64_t i = 0; i < used * NR<T>; ++i) norms[i] = i < count ? norm(query + i * channels, channels) : T(1);
  multiply<T>(p.items, channels, p.memory, queries, used, weights);
  chunk.kept[tile] = 0;
  for (int64_t i = 0; i < used; ++i) {
    const int64_t rows = least(NR<T>, count - i * NR<T>);
    attend<T>(p, items, norms + i * NR<T>, weights + i * panel, cosine);
    const int64_t kept = prune<T>(p, weights + i * panel, sparse, totals);
    chunk.kept[tile] += kept;
    if (few<T>(kept, panel, channels)) {
      read_backward<T>(p, sparse, grad + i * NR<T> * channels, rows, by_read + i * panel);
    } else {
      turn_rows<T>(grad + i * NR<T> * channels, rows, channels, grads);
      multiply<T>(p.items, channels, p.memory, grads, 1, by_read + i * panel);
    }
    attend_backward<T>(p, items, norms + i * NR<T>, weights + i * panel, cosine, sparse, totals, by_read + i * panel,
                       pull + i * NR<T>, pulls);
    if (chunk.read)
      for (int64_t item = 0; item < p.items; ++item) {
        std::memcpy(chunk.read + item * chunk.pitch + column + i * NR<T>, sparse + item * NR<T>, rows * sizeof(T));
        std::memcpy(chunk.by_dot + item * chunk.pitch + column + i * NR<T>, by_read + i * panel + item * NR<T>, rows * sizeof(T));
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

// Adds what a chunk of `rows` queries from `begin` on gives to one block of the memory's gradient; `sparse`: few weights are
// not zero.
template <class T>
void memory_block_backward(const MemoryAttention<T>& p, const Chunk<T>& chunk, bool sparse, int64_t begin, int64_t rows,
                           int64_t item, int64_t items, int64_t first, int64_t channels, T* panels,
                           const Selection<T>& room, T* sums) {
  const int64_t pitch = rounded(channels, NR<T>);
  const auto add_product = [&](const T* factor, const T* matrix, int64_t k, bool add) {
    const int64_t depth = least(DEPTH, rows - k);
    const T* from = matrix + (begin + k) * p.channels + first;
    for (int64_t c = 0; c < channels; c += NR<T>)  // panels[channel / NR][row][channel % NR]
      for (int64_t r = 0; r < depth; ++r)
        std::memcpy(panels + c * depth + r * NR<T>, from + r * p.channels + c, least(NR<T>, channels - c) * sizeof(T));
    gemm<T>(items, depth, {factor + item * chunk.pitch + k, chunk.pitch, 1}, {panels, depth * NR<T>, NR<T>}, pitch / NR<T>,
            sums, pitch, add);
  };
  if (sparse)
    for (int64_t i = 0; i < items; ++i)
      weigh_rows<T>(collect_row<T>(chunk.read + (item + i) * chunk.pitch, rows, room),
                    p.grad + begin * p.channels + first, p.channels, channels, sums + i * pitch);
  for (int64_t k = 0; k < rows; k += DEPTH) {
    if (!sparse) add_product(chunk.read, p.grad, k, k > 0);
    add_product(chunk.by_dot, p.query, k, true);
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
  const int64_t tiles = rows / width, pitch = rows + 64 / sizeof(T);  // no power of two: its rows would share a few sets of the caches
  const int64_t size = p.grad_memory ? p.items * pitch : 0;
  Scratch<T> read(size), by_dot(size), pulls(p.grad_memory ? p.items * tiles : 0), pull(p.items);
  Scratch<int64_t> kept(tiles);
  const Chunk<T> chunk = {pitch, p.grad_memory ? static_cast<T*>(read) : nullptr, by_dot, pulls, kept};
  std::memset(pull, 0, p.items * sizeof(T));
  for (int64_t begin = 0; begin < p.rows; begin += rows) {
    const int64_t count = least(rows, p.rows - begin), used = parts(count, width);
    in_parallel(p.parallel, used, [&](TaskQueue& queue) {
      for (int64_t task; (task = queue.next()) >= 0;)
        attention_tile_backward<T>(p, items, begin + task * width, least(width, count - task * width), width,
                                   task * width, task, chunk);
    });
    if (!p.grad_memory) continue;
    int64_t total = 0;
    for (int64_t tile = 0; tile < used; ++tile) total += kept[tile];
    const bool sparse = few<T>(total, count * p.items, CHANNELS);
    const int64_t across = parts(p.channels, CHANNELS);
    in_parallel(p.parallel, parts(p.items, ITEMS) * across, [&](TaskQueue& queue) {
      Scratch<T> panels(DEPTH * CHANNELS), sums(ITEMS * CHANNELS);
      const Selection<T> room(1, rows);
      std::memset(sums, 0, ITEMS * CHANNELS * sizeof(T));
      for (int64_t task; (task = queue.next()) >= 0;) {
        const int64_t item = task / across * ITEMS, first = task % across * CHANNELS;
        memory_block_backward<T>(p, chunk, sparse, begin, count, item, least(ITEMS, p.items - item), first,
                                 least(CHANNELS, p.channels - first), panels, room, sums);
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

BKD_DEFINE_KERNEL(memory_attention_backward, MemoryAttention)

}  // namespace bkd
