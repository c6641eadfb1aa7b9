// Sparse memory attention: a tile of queries stays in cache from its similarities to its result.
#include "memory_attention.h"

#include "attention.h"

namespace bkd {
namespace {

template <class T>
void memory_attention(const MemoryAttention<T>& p) {
  const Items<T> items(p);
  const int64_t width = attention_rows(p, 1), tiles = parts(p.rows, width), channels = p.channels;
  in_parallel(p.parallel, tiles, [&](TaskQueue& queue) {
    Scratch<T> panels(width * channels), weights(width * p.items), norms(width), totals(NR<T>);
    const Selection<T> room(NR<T>, p.items);
    Terms<T> terms[NR<T>];
    for (int64_t task; (task = queue.next()) >= 0;) {
      const int64_t begin = task * width, count = least(width, p.rows - begin), used = parts(count, NR<T>);
      const T* query = p.query + begin * channels;
      turn_rows<T>(query, count, channels, panels);
      for (int64_t i = 0; i < used * NR<T>; ++i) norms[i] = i < count ? norm(query + i * channels, channels) : T(1);
      multiply<T>(p.items, channels, p.memory, panels, used, weights);
      int64_t kept = 0;
      for (int64_t i = 0; i < used; ++i) {
        T* panel = weights + i * p.items * NR<T>;
        attend<T>(p, items, norms + i * NR<T>, panel, nullptr);
        kept += prune<T>(p, panel, panel, totals);
      }
      T* output = p.output + begin * channels;
      if (few<T>(kept, used * NR<T> * p.items, channels)) {
        for (int64_t i = 0; i < count; ++i) {
          if (i % NR<T> == 0) collect_panel<T>(weights + i * p.items, p.items, room, terms);
          weigh_rows<T>(terms[i % NR<T>], p.memory, channels, channels, output + i * channels);
        }
        continue;
      }
      multiply<T>(channels, p.items, items.turned, weights, used, panels);
      for (int64_t i = 0; i < count; i += NR<T>)
        transpose_block<T>(panels + i * channels, NR<T>, channels, least(NR<T>, count - i), output + i * channels, channels);
    }
  });
}

}  // namespace

BKD_DEFINE_KERNEL(memory_attention, MemoryAttention)

}  // namespace bkd
