// That the emulation multiplies and refuses as the hardware does: selftest CASE ends with 0, or with a message.
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "amx_emulation.h"

namespace {

struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

void configure(const Config& config) {
  __asm__ volatile("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
}
// C: m x n floats; A: m x k pairs; B: k x n pairs.
Config shapes(int m, int n, int k) {
  Config config;
  config.rows[0] = m, config.bytes[0] = 4 * n;
  config.rows[1] = m, config.bytes[1] = 4 * k;
  config.rows[2] = k, config.bytes[2] = 4 * n;
  return config;
}

uint16_t bfloat(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits >> 16;
}
float value_of(uint16_t bfloat) {
  const uint32_t bits = uint32_t(bfloat) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

void expect(bool right, const char* what) {
  if (right) return;
  std::printf("%s\n", what);
  std::exit(1);
}

// Whole numbers, whose sums are exact in any order, against three loops.
void check_product(int m, int n, int k) {
  uint16_t a[16][40], b[16][48];  // rows that are further apart than they are long
  float c[16][20], expected[16][20];
  for (auto& row : a)
    for (auto& x : row) x = bfloat(std::rand() % 17 - 8);
  for (auto& row : b)
    for (auto& x : row) x = bfloat(std::rand() % 17 - 8);
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 20; ++j) {
      expected[i][j] = c[i][j] = std::rand() % 100;
      if (i >= m || j >= n) continue;
      for (int d = 0; d < 2 * k; ++d) expected[i][j] += value_of(a[i][d]) * value_of(b[d / 2][2 * j + d % 2]);
    }
  configure(shapes(m, n, k));
  __asm__ volatile("" : : "r"(a), "r"(b), "r"(c) : "memory");
  _tile_loadd(0, c, sizeof c[0]);
  _tile_loadd(1, a, sizeof a[0]);
  _tile_loadd(2, b, sizeof b[0]);
  _tile_dpbf16ps(0, 1, 2);
  _tile_stored(0, c, sizeof c[0]);
  expect(!std::memcmp(c, expected, sizeof c), "a product differs from three loops, or writes outside");
  _tile_zero(0);
  _tile_stored(0, c, sizeof c[0]);
  expect(c[0][0] == 0 && c[m - 1][n - 1] == 0, "tilezero leaves numbers");
  _tile_release();
}

// One number: c + x[0] y[0] + x[1] y[1] ..., the pairs one after the other.
float sum(float c, const float (&x)[4], const float (&y)[4]) {
  uint16_t a[4], b[2][2];
  for (int i = 0; i < 4; ++i) a[i] = bfloat(x[i]), b[i / 2][i % 2] = bfloat(y[i]);
  configure(shapes(1, 1, 2));
  __asm__ volatile("" : : "r"(a), "r"(b), "r"(&c) : "memory");
  _tile_loadd(0, &c, 4);
  _tile_loadd(1, a, 8);
  _tile_loadd(2, b, 4);
  _tile_dpbf16ps(0, 1, 2);
  _tile_stored(0, &c, 4);
  return c;
}

void check_rounding() {
  const float tiny = std::ldexp(1.0f, -12), least = std::ldexp(1.0f, -126);
  expect(sum(0, {1, 0, tiny, 0}, {1, 0, tiny, 0}) == 1, "a tie is not rounded to even");
  expect(sum(0, {1.0078125f, 0, tiny, 0}, {1, 0, 1.5f * tiny, 0}) > 1.0078125f, "does not round to nearest");
  // The second numbers have a sum of their own, which is added to the first's before it is to C.
  expect(sum(-1, {1, tiny, 0, 0}, {1, tiny, 0, 0}) == 0, "the order of sums differs");
  expect(sum(0, {least, 0, 0, 0}, {0.5f, 0, 0, 0}) == 0, "a denormal result is not flushed");
  expect(sum(0, {least / 2, 0, 0, 0}, {std::ldexp(1.0f, 100), 0, 0, 0}) == 0, "a denormal factor is not zero");
  expect(std::isnan(sum(0, {0, 0, 0, 0}, {INFINITY, 0, 0, 0})), "zero times infinity is a number");
}

}  // namespace

int main(int, char** arguments) {
  const char* name = arguments[1];
  const auto is = [&](const char* other) { return !std::strcmp(name, other); };
  if (!is("no permission")) syscall(SYS_arch_prctl, 0x1023, 18);
  Config config = shapes(16, 16, 16);
  if (is("products")) {
    check_product(16, 16, 16), check_product(3, 16, 16), check_product(16, 5, 9), check_product(1, 1, 1);
    check_rounding();
    return 0;
  }
  if (is("17 rows")) config.rows[3] = 17, config.bytes[3] = 64;
  if (is("65 bytes")) config.rows[3] = 16, config.bytes[3] = 68;
  if (is("rows alone")) config.rows[3] = 1;
  if (is("palette")) config.palette = 2;
  if (is("reserved")) config.reserved[3] = 1;
  if (is("other depth")) config.rows[2] = 15;
  if (!is("not configured")) configure(config);
  if (is("released")) _tile_release();
  if (is("unused tile")) _tile_zero(5);
  if (is("ninth tile")) __asm__ volatile(".byte 0xc4, 0xe2, 0x3a, 0x5c, 0xc1");  // tdpbf16ps tmm0, tmm1, "tmm8"
  if (is("same tile")) __asm__ volatile(".byte 0xc4, 0xe2, 0x72, 0x5c, 0xc1");   // tdpbf16ps tmm0, tmm1, tmm1
  _tile_dpbf16ps(0, 1, 2);
  return 0;
}
