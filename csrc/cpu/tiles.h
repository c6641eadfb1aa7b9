// Products of pairs of bfloat16 in tiles of 16 rows of 64 bytes (AMX). A block of C is 2 x 2 tiles: a panel's columns.
#pragma once

namespace bkd {
namespace {

constexpr int64_t TILE = 16;          // rows; pairs or floats of a row
constexpr int64_t ROWS = 2 * TILE;    // of A at a time
constexpr int64_t TIMES_AS_FAST = 8;  // as products of floats; 16 where nothing waits for memory

// Compilers do not know what the instructions of tiles read. This makes them finish what they write.
BKD_INLINE void finish_writing(const void* at) { __asm__ volatile("" : : "r"(at) : "memory"); }

// Tiles 0 to 3 are a block of C, 4 and 5 rows of A, 6 and 7 columns of B. Rows below the first 16 are the odd ones of
// C and A.
BKD_INLINE void shape_tiles(int64_t rows) {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } shapes;
  static_assert(sizeof shapes == 64, "what ldtilecfg reads");
  for (int tile = 0; tile < 8; ++tile) {
    const int64_t count = tile >= 6 ? TILE : max(0, min(TILE, tile % 2 ? rows - TILE : rows));
    shapes.rows[tile] = uint8_t(count), shapes.row_bytes[tile] = count ? 64 : 0;
  }
  finish_writing(&shapes);
  _tile_loadconfig(&shapes);
}

// Has a thread's tiles while it lives.
struct Multiplier {
  BKD_INLINE Multiplier() { shape_tiles(ROWS); }
  BKD_INLINE ~Multiplier() { _tile_release(); }
  Multiplier(const Multiplier&) = delete;
  Multiplier& operator=(const Multiplier&) = delete;
};

// C += A B, of 16 pairs.
template <bool Tall>
BKD_INLINE void add_step(const Pair* a, int64_t a_stride, const Pair* b) {
  _tile_loadd(4, a, a_stride * sizeof(Pair));
  _tile_loadd(6, b, COLUMNS * sizeof(Pair));
  _tile_loadd(7, b + TILE, COLUMNS * sizeof(Pair));
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(2, 4, 7);
  if constexpr (Tall) {
    _tile_loadd(5, a + TILE * a_stride, a_stride * sizeof(Pair));
    _tile_dpbf16ps(1, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

// Tall: more than 16 rows.
template <bool Tall>
void multiply_tiles(int64_t rows, int64_t depth, Left<Pair> a, PairPanels b, Products c, Fetch fetch) {
  const int64_t rest = depth % TILE, whole = depth - rest, stride = c.row_stride * int64_t(sizeof(float));
  alignas(64) Pair a_end[ROWS * TILE], b_end[TILE * COLUMNS];  // the last of the depth, filled up with zeros
  if (rest) {
    const auto last = __mmask16((1u << rest) - 1);
    for (int64_t r = 0; r < rows; ++r)
      store_pairs(a_end + r * TILE, _mm512_maskz_loadu_epi32(last, a.at + r * a.row_stride + whole));
    std::memset(b_end, 0, sizeof b_end);
  }
  finish_writing(a_end);
  for (int64_t p = 0; p < b.count; ++p, b.at += b.stride, c.at += c.panel_stride) {
    float* below = c.at + TILE * c.row_stride;
    _tile_zero(0);
    _tile_zero(2);
    if constexpr (Tall) {
      _tile_zero(1);
      _tile_zero(3);
    }
    if (c.add) {
      _tile_loadd(0, c.at, stride);
      _tile_loadd(2, c.at + TILE, stride);
      if constexpr (Tall) {
        _tile_loadd(1, below, stride);
        _tile_loadd(3, below + TILE, stride);
      }
    }
    for (int64_t k = 0; k < whole; k += TILE) {
      for (int64_t step = 0; step < TILE; step += fetch.every) fetch.next();
      add_step<Tall>(a.at + k, a.row_stride, b.at + k * COLUMNS);
    }
    if (rest) {
      std::memcpy(b_end, b.at + whole * COLUMNS, rest * COLUMNS * sizeof(Pair));
      finish_writing(b_end);
      add_step<Tall>(a_end, TILE, b_end);
    }
    _tile_stored(0, c.at, stride);
    _tile_stored(2, c.at + TILE, stride);
    if constexpr (Tall) {
      _tile_stored(1, below, stride);
      _tile_stored(3, below + TILE, stride);
    }
  }
}

// C (+)= A B, of up to ROWS rows of A, whose depth is contiguous, and `depth` pairs.
BKD_INLINE void multiply_pairs(int64_t rows, int64_t depth, Left<Pair> a, PairPanels b, Products c, Fetch fetch = {}) {
  if (rows == ROWS) return multiply_tiles<true>(rows, depth, a, b, c, fetch);
  shape_tiles(rows);
  if (rows > TILE)
    multiply_tiles<true>(rows, depth, a, b, c, fetch);
  else
    multiply_tiles<false>(rows, depth, a, b, c, fetch);
  shape_tiles(ROWS);
}

}  // namespace
}  // namespace bkd
