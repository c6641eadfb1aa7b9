// Runs the machine code of AMX on a CPU without it: a signal handler takes the place of each instruction that the CPU
// does not know. What the hardware refuses, by Intel's manual, ends the process with a message.
#include "amx_emulation.h"

#include <immintrin.h>
#include <signal.h>
#include <ucontext.h>

#include <cerrno>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace amx_emulation {
namespace {

constexpr unsigned TILE_BIT = 1u << 24, BF16_BIT = 1u << 22;

bool is(const char* option) {
  const char* chosen = std::getenv("AMX_EMULATION");
  return chosen && std::strcmp(chosen, option) == 0;
}

bool permitted = false;  // of the process
int64_t product_count = 0;

struct Tile {
  int rows, bytes;  // of a row; both are zero where the tile is not configured
  alignas(64) unsigned char data[16][64];
};
// Of a thread.
thread_local bool configured = false;
thread_local Tile tiles[8];

[[noreturn]] void refuse(const char* why) {
  std::fprintf(stderr, "AMX emulation: %s\n", why);
  std::abort();
}

Tile& tile(int index) {
  if (!configured) refuse("tiles are used before ldtilecfg");
  if (index > 7) refuse("there are eight tiles");
  if (!tiles[index].rows) refuse("a tile is used that is not configured");
  return tiles[index];
}

void release() {
  configured = false;
  std::memset(tiles, 0, sizeof tiles);
}

void load_config(const unsigned char* from) {
  release();
  if (from[0] == 0) return;
  if (from[0] != 1) refuse("ldtilecfg: there is no such palette");
  if (from[1]) refuse("ldtilecfg: starts after row 0, which the emulation has not");
  for (int i = 0; i < 64; ++i) {
    const bool used = i < 2 || (i >= 16 && i < 32) || (i >= 48 && i < 56);
    if (!used && from[i]) refuse("ldtilecfg: reserved bytes are not zero");
  }
  for (int i = 0; i < 8; ++i) {
    const int bytes = from[16 + 2 * i] + 256 * from[17 + 2 * i], rows = from[48 + i];
    if (rows > 16) refuse("ldtilecfg: more than 16 rows");
    if (bytes > 64) refuse("ldtilecfg: more than 64 bytes of a row");
    if (!rows != !bytes) refuse("ldtilecfg: rows without bytes, or bytes without rows");
    tiles[i].rows = rows, tiles[i].bytes = bytes;
  }
  configured = true;
}

void load_tile(Tile& to, const unsigned char* from, int64_t stride) {
  std::memset(to.data, 0, sizeof to.data);
  for (int r = 0; r < to.rows; ++r) std::memcpy(to.data[r], from + r * stride, to.bytes);
}
void store_tile(const Tile& from, unsigned char* to, int64_t stride) {
  for (int r = 0; r < from.rows; ++r) std::memcpy(to + r * stride, from.data[r], from.bytes);
}

float widened(const unsigned char* bfloat) {
  const uint32_t bits = uint32_t(bfloat[0] | bfloat[1] << 8) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Sums of the first and of the second numbers of pairs, then both to C. MXCSR flushes, and takes denormals as zero.
__attribute__((noinline, target("avx2,fma"))) void multiply(Tile& c, const Tile& a, const Tile& b) {
  const int columns = c.bytes / 4;
  for (int m = 0; m < c.rows; ++m) {
    float first[16] = {}, second[16] = {}, row[16];
    for (int k = 0; k < a.bytes / 4; ++k) {
      const float x = widened(a.data[m] + 4 * k), y = widened(a.data[m] + 4 * k + 2);
      for (int n = 0; n < columns; ++n) {
        first[n] = __builtin_fmaf(x, widened(b.data[k] + 4 * n), first[n]);
        second[n] = __builtin_fmaf(y, widened(b.data[k] + 4 * n + 2), second[n]);
      }
    }
    std::memcpy(row, c.data[m], sizeof row);
    for (int n = 0; n < columns; ++n) row[n] += first[n] + second[n];
    std::memset(c.data[m], 0, sizeof c.data[m]);
    std::memcpy(c.data[m], row, c.bytes);
  }
}

void add_products(Tile& c, const Tile& a, const Tile& b) {
  if (&c == &a || &c == &b || &a == &b) refuse("tdpbf16ps: two of its tiles are the same");
  if (a.bytes % 4 || b.bytes % 4 || c.bytes % 4) refuse("tdpbf16ps: rows that are no whole pairs");
  if (c.rows != a.rows || c.bytes != b.bytes || a.bytes / 4 != b.rows) refuse("tdpbf16ps: shapes do not fit");
  _mm_setcsr(_MM_MASK_MASK | _MM_ROUND_NEAREST | _MM_FLUSH_ZERO_ON | 0x40);  // the signal's end restores it
  multiply(c, a, b);
  __atomic_fetch_add(&product_count, 1, __ATOMIC_RELAXED);
}

// The registers of an address, by their numbers.
constexpr int REGISTERS[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                             REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

// Executes an instruction and returns its length; 0 where it is none of AMX.
int execute(const unsigned char* code, const greg_t* registers) {
  if (code[0] != 0xc4 || (code[1] & 0x1f) != 2 || code[2] & 0x84) return 0;  // VEX.128.0F38.W0
  const int prefix = code[2] & 3, opcode = code[3], mode = code[4] >> 6;     // 0: none, 2: F3, 3: F2
  if (opcode != 0x49 && opcode != 0x4b && opcode != 0x5c) return 0;
  if (!permitted) refuse("Linux was not asked for tiles");
  const int reg = (code[4] >> 3 & 7) + (code[1] & 0x80 ? 0 : 8), other = ~(code[2] >> 3) & 15;
  const int high_x = code[1] & 0x40 ? 0 : 8, high_b = code[1] & 0x20 ? 0 : 8, low = code[4] & 7;
  if (opcode != 0x5c && other) return 0;
  if (mode == 3) {
    if (opcode == 0x5c && prefix == 2)
      add_products(tile(reg), tile(low + high_b), tile(other));
    else if (opcode == 0x49 && prefix == 3 && low == 0)
      std::memset(tile(reg).data, 0, sizeof tiles[0].data);
    else if (opcode == 0x49 && prefix == 0 && code[4] == 0xc0)
      release();
    else
      return 0;
    return 5;
  }
  int length = 5;
  int64_t stride = 0;
  int base = low + high_b;
  if (low == 4) {
    const int sib = code[length++], index = (sib >> 3 & 7) + high_x;
    base = (sib & 7) + high_b;
    if (index != 4) stride = registers[REGISTERS[index]] << (sib >> 6);
    if ((sib & 7) == 5 && mode == 0) return 0;  // no base
  }
  const bool relative = low == 5 && mode == 0;
  int32_t offset = 0;
  if (mode == 1) offset = static_cast<signed char>(code[length++]);
  if (mode == 2 || relative) std::memcpy(&offset, code + length, 4), length += 4;
  const int64_t start = relative ? reinterpret_cast<int64_t>(code) + length : registers[REGISTERS[base]];
  auto* at = reinterpret_cast<unsigned char*>(start + offset);
  if (opcode == 0x49 && prefix == 0 && reg == 0) {
    load_config(at + stride);
  } else if (opcode == 0x4b && (prefix == 2 || prefix == 3) && low == 4) {
    if (prefix == 3)
      load_tile(tile(reg), at, stride);
    else
      store_tile(tile(reg), at, stride);
  } else {
    return 0;
  }
  return length;
}

void on_illegal_instruction(int, siginfo_t*, void* context) {
  greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const int length = execute(reinterpret_cast<const unsigned char*>(registers[REG_RIP]), registers);
  if (!length) {
    signal(SIGILL, SIG_DFL);  // and the instruction again
    return;
  }
  registers[REG_RIP] += length;
}

__attribute__((constructor)) void install() {
  struct sigaction action {};
  action.sa_sigaction = on_illegal_instruction;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGILL, &action, nullptr);
}

}  // namespace

int cpuid(unsigned leaf, unsigned, unsigned* eax, unsigned* ebx, unsigned* ecx, unsigned* edx) {
  *eax = *ebx = *ecx = *edx = 0;
  if (leaf == 7) *edx = (is("no-tile") ? 0 : TILE_BIT) | (is("no-bf16") ? 0 : BF16_BIT);
  return 1;
}

long arch_prctl(long number, long code, long feature) {
  if (number != 158 || code != 0x1023 || feature != 18) {  // arch_prctl, ARCH_REQ_XCOMP_PERM, the data of tiles
    errno = EINVAL;
    return -1;
  }
  if (is("refused")) {
    errno = ENOSPC;  // as where a signal stack is too small
    return -1;
  }
  permitted = true;
  return 0;
}

}  // namespace amx_emulation

// For tests: products so far, of all threads; whether this thread has tiles.
extern "C" __attribute__((visibility("default"))) int64_t amx_emulation_products() {
  return __atomic_load_n(&amx_emulation::product_count, __ATOMIC_RELAXED);
}
extern "C" __attribute__((visibility("default"))) int amx_emulation_configured() { return amx_emulation::configured; }
