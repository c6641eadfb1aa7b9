// Sparse memory attention of bfloat16: as memory_attention.simd.cpp. Both products multiply bfloat16; the weights are
// float32 until the second product rounds them, or not at all where they are listed.
#include "memory_attention.h"
#include "attention.h"
#include "bfloat.h"

namespace bkd {
namespace {

// |from|, of one row.
BKD_INLINE float norm_of(const BFloat* from, int64_t channels) {
  Vec<float> squares = {};
  for (int64_t c = 0; c < channels; c += 32) {
    const __m512i pairs = load_pairs(from + c, channels - c);
    squares = add_products(squares, pairs, pairs);
  }
  return std::sqrt(lane_sum<float>(squares));
}

// What all tiles of one call use of the memory.
class BFloatItems : public ItemNorms<float> {
 public:
  explicit BFloatItems(const BFloatMemoryAttention& p)
      : ItemNorms<float>(p.items),
        pitch(row_pitch(parts(p.channels, 2))),
        depth(parts(p.items, 2)),
        rows(p.items * pitch),
        p_(p),
        columns_(rounded(p.channels, COLUMNS) * depth),
        states_(parts(p.channels, COLUMNS)) {
    for (int64_t i = 0; i < parts(p.channels, COLUMNS); ++i) new (states_ + i) State(MISSING);
    constexpr int64_t STRIP = 64;
    in_parallel(p.parallel, parts(p.items, STRIP), [&](TaskQueue& queue) {
      for (int64_t task; (task = queue.next()) >= 0;)
        for (int64_t i = task * STRIP; i < min((task + 1) * STRIP, p.items); ++i) {
          const BFloat* row = p.bfloat_memory + i * p.channels;
          for (int64_t c = 0; c < p.channels; c += 32)
            store_pairs(rows + i * pitch + c / 2, load_pairs(row + c, p.channels - c));
          set(i, norm_of(row, p.channels));
        }
    });
  }
  // [item / 2][channel % 32] of the channels from c on. The first thread that needs them makes them, since few weights
  // that are kept may not need any.
  const Pair* columns(int64_t c) const {
    Pair* panel = columns_ + c * depth;
    State& state = states_[c / COLUMNS];
    int expected = MISSING;
    if (state.compare_exchange_strong(expected, IN_WORK, std::memory_order_acquire)) {
      for (int64_t j = 0; j < depth; ++j) {
        const BFloat* first = p_.bfloat_memory + 2 * j * p_.channels + c;
        const __m512i second = 2 * j + 1 < p_.items ? load_pairs(first + p_.channels, p_.channels - c) : __m512i{};
        store_interleaved(load_pairs(first, p_.channels - c), second, panel + j * COLUMNS);
      }
      state.store(READY, std::memory_order_release);
    }
    while (state.load(std::memory_order_acquire) != READY) _mm_pause();
    return panel;
  }

  const int64_t pitch, depth;
  Scratch<Pair> rows;  // [item][channel / 2], in rows of `pitch`

 private:
  using State = std::atomic<int>;
  enum { MISSING, IN_WORK, READY };
  const BFloatMemoryAttention& p_;
  Scratch<Pair> columns_;
  Scratch<State> states_;
};

// panels[row / 32][channel / 2][row % 32], and norms; rows that fill up the last panel are zero, and their norms one.
void load_queries(const BFloatMemoryAttention& p, const BFloat* from, int64_t rows, Pair* panels, float* norms) {
  const int64_t depth = parts(p.channels, 2);
  alignas(64) Pair square[PAIRS * PAIRS] = {};
  for (int64_t i = 0; i < rounded(rows, COLUMNS); i += PAIRS) {
    const int64_t count = max(0, min(PAIRS, rows - i));
    // Row after row, which brings them into the first cache.
    for (int64_t k = 0; k < PAIRS; ++k) norms[i + k] = k < count ? norm_of(from + (i + k) * p.channels, p.channels) : 1;
    if (count < PAIRS) std::memset(square, 0, sizeof square);
    for (int64_t c = 0; c < p.channels; c += 32) {
      for (int64_t k = 0; k < count; ++k)
        store_pairs(square + k * PAIRS, load_pairs(from + (i + k) * p.channels + c, p.channels - c));
      transpose_pairs(square, PAIRS, min(PAIRS, depth - c / 2),
                      panels + i / COLUMNS * COLUMNS * depth + c / 2 * COLUMNS + i % COLUMNS, COLUMNS);
    }
  }
}

// The terms of PAIRS sums: what is not zero of weights[row][NR]. Each is written in whole vectors.
void collect_terms(const float* weights, int64_t rows, Terms<float>* terms) {
  alignas(64) int32_t index[PAIRS];
  for (int i = 0; i < PAIRS; ++i) index[i] = i;
  for (int64_t r = 0; r < rows; r += PAIRS) {
    Vec<float> square[PAIRS] = {};
    for (int64_t k = 0; k < min(PAIRS, rows - r); ++k) square[k] = load(weights + (r + k) * COLUMNS);
    transpose<float>(square);
    const auto items = (Simd<float>::I)load_pairs(index) + int32_t(r);
    for (int i = 0; i < PAIRS; ++i) {
      const auto kept = static_cast<__mmask16>(nonzero<float>(square[i]));
      store(terms[i].weights + terms[i].count, Vec<float>(_mm512_maskz_compress_ps(kept, square[i])));
      store_pairs(terms[i].rows + terms[i].count, _mm512_maskz_compress_epi32(kept, (__m512i)items));
      terms[i].count += __builtin_popcount(kept);
    }
  }
}

// to[0..channels) = a sum of rows of the memory, for Blocks x 32 channels at a time.
template <int Blocks>
int64_t weigh_blocks(const Terms<float>& terms, const BFloat* memory, int64_t channels, int64_t begin, BFloat* to) {
  int64_t c = begin;
  for (; c < channels && (Blocks == 1 || c + 32 * Blocks <= channels); c += 32 * Blocks) {
    Vec<float> first[Blocks] = {}, second[Blocks] = {};
    const int64_t left = channels - c;
    for (int64_t k = 0; k < terms.count; ++k) {
      const Vec<float> weight = all(terms.weights[k]);
      const BFloat* row = memory + terms.rows[k] * channels + c;
#pragma GCC unroll 4
      for (int b = 0; b < Blocks; ++b) {
        const __m512i pairs = Blocks == 1 ? load_pairs(row, left) : load_pairs(row + 32 * b);
        first[b] += weight * first_of(pairs);
        second[b] += weight * second_of(pairs);
      }
    }
    for (int b = 0; b < Blocks; ++b) store_pairs(to + c + 32 * b, pairs_of(first[b], second[b]), left - 32 * b);
  }
  return c;
}

// The weights of one panel as pairs of items, to[row][item / 2] in rows of `pitch`. Writes whole vectors.
void round_weights(const float* weights, int64_t items, Pair* to, int64_t pitch) {
  alignas(64) Pair square[PAIRS * PAIRS];
  const auto row = [&](int64_t i, int64_t c) { return i < items ? load(weights + i * COLUMNS + c) : Vec<float>{}; };
  for (int64_t i = 0; i < items; i += 2 * PAIRS)
    for (int64_t c = 0; c < COLUMNS; c += PAIRS) {
      for (int64_t k = 0; k < PAIRS; ++k)
        store_pairs(square + k * PAIRS, pairs_of(row(i + 2 * k, c), row(i + 2 * k + 1, c)));
      transpose_pairs(square, PAIRS, PAIRS, to + c * pitch + i / 2, pitch);
    }
}

void memory_attention_bfloat(const BFloatMemoryAttention& p) {
  const BFloatItems items(p);
  const int64_t width = attention_rows<float>(p, 1), tiles = parts(p.rows, width), channels = p.channels;
  const int64_t depth = parts(channels, 2), pitch = row_pitch(items.depth);
  in_parallel(p.parallel, tiles, [&](TaskQueue& queue) {
    Scratch<Pair> panels(width * depth), factors(width * pitch);
    Scratch<float> weights(width * p.items), norms(width), totals(COLUMNS), sums(COLUMNS * COLUMNS);
    Scratch<int64_t> whole(width / COLUMNS);
    const Selection<float> selection(COLUMNS, p.items + PAIRS);
    Terms<float> terms[COLUMNS];
    const Multiplier multiplier;
    for (int64_t task; (task = queue.next()) >= 0;) {
      const int64_t begin = task * width, count = min(width, p.rows - begin), used = parts(count, COLUMNS);
      const auto rows_of = [&](int64_t panel) { return min(COLUMNS, count - panel * COLUMNS); };
      load_queries(p, p.bfloat_query + begin * channels, count, panels, norms);
      for (int64_t i = 0; i < p.items; i += ROWS)
        multiply_pairs(min(ROWS, p.items - i), depth, {items.rows + i * items.pitch, items.pitch, 1},
                       {panels, depth * COLUMNS, used}, {weights + i * COLUMNS, COLUMNS, p.items * COLUMNS, false});
      BFloat* output = p.bfloat_output + begin * channels;
      int64_t wholes = 0;  // panels that are multiplied whole
      for (int64_t i = 0; i < used; ++i) {
        float* panel = weights + i * p.items * COLUMNS;
        attend<float>(p, items, norms + i * COLUMNS, panel, nullptr);
        const int64_t kept = prune<float>(p, panel, panel, totals);
        if (!few<float>(kept, COLUMNS * p.items, channels, TIMES_AS_FAST)) {
          round_weights(panel, p.items, factors + wholes * COLUMNS * pitch, pitch);
          whole[wholes++] = i;
          continue;
        }
        for (int64_t j = 0; j < COLUMNS; ++j) terms[j] = selection.empty(j);
        for (int64_t j = 0; j < COLUMNS; j += PAIRS) collect_terms(panel + j, p.items, terms + j);
        for (int64_t r = 0; r < rows_of(i); ++r) {
          BFloat* row = output + (i * COLUMNS + r) * channels;
          weigh_blocks<1>(terms[r], p.bfloat_memory, channels,
                          weigh_blocks<4>(terms[r], p.bfloat_memory, channels, 0, row), row);
        }
      }
      for (int64_t c = 0; c < channels && wholes; c += COLUMNS) {
        const Pair* columns = items.columns(c);
        for (int64_t i = 0; i < wholes; ++i) {
          const Pair* left = factors + i * COLUMNS * pitch;
          const int64_t rows = rows_of(whole[i]);
          BFloat* to = output + whole[i] * COLUMNS * channels + c;
          for (int64_t r = 0; r < rows; r += ROWS) {
            const int64_t count = min(ROWS, rows - r);
            const Fetch written(to + r * channels, count, 0, channels * sizeof(BFloat), items.depth);
            multiply_pairs(count, items.depth, {left + r * pitch, pitch, 1}, {columns, 0, 1},
                           {sums + r * COLUMNS, COLUMNS, 0, false}, written);
          }
          for (int64_t r = 0; r < rows; ++r)
            store_pairs(to + r * channels, rounded_panel(sums + r * COLUMNS), channels - c);
        }
      }
    }
  });
}

}  // namespace

BKD_DEFINE_BFLOAT_KERNEL(memory_attention_bfloat, BFloatMemoryAttention)

}  // namespace bkd
