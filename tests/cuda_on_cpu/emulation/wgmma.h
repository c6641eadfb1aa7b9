// Emulation of the PTX in csrc/cuda/wgmma.cuh: mbarrier, cp.async.bulk and wgmma, with the layouts of the PTX manual.
#pragma once

#include "instructions.h"

namespace emulated {

// Of dynamic shared memory, which starts at a multiple of 1024 bytes as on a device.
inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - dynamic_buffer.data());
}

// An mbarrier, in its eight bytes of shared memory.
struct BarrierState {
  uint8_t count, missing;  // arrivals of a phase, and those not there yet
  uint16_t phase;
  int32_t bytes;  // to be copied in this phase
};
inline BarrierState state_of(const void* barrier) {
  BarrierState state;
  std::memcpy(&state, barrier, sizeof(state));
  if (state.count == 0 || state.count == 0xff) throw std::runtime_error("mbarrier: it is not initialized");
  return state;
}
inline void end_phase(void* barrier, BarrierState state) {
  if (state.missing == 0 && state.bytes == 0) {
    ++state.phase;
    state.missing = state.count;
  }
  std::memcpy(barrier, &state, sizeof(state));
}
inline void init_barrier(void* barrier, int count) {
  if (reinterpret_cast<uintptr_t>(barrier) % 8) throw std::runtime_error("mbarrier: it is not aligned to 8 bytes");
  const BarrierState state{static_cast<uint8_t>(count), static_cast<uint8_t>(count), 0, 0};
  std::memcpy(barrier, &state, sizeof(state));
}
inline void arrive(void* barrier, int bytes) {
  BarrierState state = state_of(barrier);
  if (state.missing == 0) throw std::runtime_error("mbarrier: more threads arrive than it counts");
  --state.missing;
  state.bytes += bytes;
  end_phase(barrier, state);
}
inline void wait_for_phase(void* barrier, int parity, const char* file, int line) {
  wait_until(
      [=] {
        for (size_t i = 0; i < bulk_copies.size(); ++i) {
          const BulkCopy copy = bulk_copies[i];
          if (copy.barrier != barrier) continue;
          std::memcpy(copy.target, copy.source, copy.bytes);
          BarrierState state = state_of(barrier);
          state.bytes -= copy.bytes;
          end_phase(barrier, state);
          bulk_copies.erase(bulk_copies.begin() + static_cast<std::ptrdiff_t>(i--));
        }
        return (state_of(barrier).phase & 1) != parity;
      },
      file, line);
}
inline void copy_bulk(void* target, const void* source, int bytes, void* barrier, const char* file, int line) {
  if (reinterpret_cast<uintptr_t>(target) % 16 || reinterpret_cast<uintptr_t>(source) % 16 || bytes % 16) {
    throw std::runtime_error("cp.async.bulk: addresses and size are not multiples of 16 bytes");
  }
  state_of(barrier);
  for (int at = 0; at < bytes; at += 32) {
    traffic::global(static_cast<const std::byte*>(source) + at, 32, traffic::Kind::kLoad, file, line);
  }
  for (int at = 0; at < bytes; at += 128) {
    traffic::shared(static_cast<std::byte*>(target) + at, 128, traffic::Kind::kStore, file, line);
  }
  std::memset(target, 0xff, bytes);
  bulk_copies.push_back({target, source, bytes, barrier});
}

inline void begin_products() { products[thread_number()].begun = true; }
inline void commit_products() {
  Products& own = products[thread_number()];
  ++own.group;
  own.begun = false;
}

// The 16 bytes of chunk `chunk` of row `row` of an operand in shared memory, whose depth is contiguous.
inline const unsigned char* chunk_of(uint64_t descriptor, int row, int chunk) {
  const auto field = [&](int first, int bits) {
    return static_cast<uint32_t>(descriptor >> first & ((1u << bits) - 1));
  };
  const uint32_t start = field(0, 14) * 16, eight_rows = field(32, 14) * 16, swizzle = field(62, 2);
  if (field(49, 3)) throw std::runtime_error("wgmma: no offset of the base is emulated");
  if (swizzle == 0) throw std::runtime_error("wgmma: no operand without swizzle is emulated");
  const uint32_t line = 256u >> swizzle, turns = line / 16 - 1;  // swizzles of 128, 64 and 32 bytes
  uint32_t at = start + row / 8 * eight_rows + row % 8 * line + chunk * 16;
  at ^= (at >> 7 & turns) << 4;
  if (at + 16 > dynamic_buffer.size()) throw std::runtime_error("wgmma: b is outside of shared memory");
  return dynamic_buffer.data() + at;
}

// c += a b for 16 rows of a of this warp, 128 columns of b, 16 numbers of depth.
template <class T>
void multiply_async(float (*c)[4], const uint32_t (&a)[4], uint64_t b, const char* file, int line) {
  constexpr int kColumns = 128, kDepth = 16;
  Products& own = products[thread_number()];
  if (!own.begun) throw std::runtime_error("wgmma: no fence before the products of a group");
  auto sums = std::find_if(own.sums.begin(), own.sums.end(), [&](const Sums& one) { return one.c == c; });
  if (sums == own.sums.end()) {
    own.sums.push_back({c, {}});
    sums = own.sums.end() - 1;
    std::memcpy(sums->value, c, sizeof(sums->value));
    std::memset(c, 0xff, sizeof(sums->value));
  }
  Product product{c, a, {}, {}, {}, own.group};
  std::memcpy(product.own_a, a, sizeof(product.own_a));
  const std::byte* shown = wait_for_warp(a, sizeof(a), file, line);
  const int lane = thread_number() % kWarp;
  float left[2][kDepth];  // rows lane / 4 and lane / 4 + 8
  for (int k = 0; k < kDepth; ++k) {
    const int owner = lane / 4 * 4 + k % 8 / 2;
    for (int below = 0; below < 2; ++below) {
      left[below][k] = number<T>(shown + owner * kLaneBytes + (k / 8 * 2 + below) * 4 + k % 2 * 2);
    }
  }
  for (int j = 0; j < kColumns / 8; ++j) {
    for (int beside = 0; beside < 2; ++beside) {
      const int column = j * 8 + lane % 4 * 2 + beside;
      for (int chunk = 0; chunk < 2; ++chunk) {
        const auto* right = reinterpret_cast<const std::byte*>(chunk_of(b, column, chunk));
        for (int k = 0; k < 8; ++k) {
          const float factor = number<T>(right + 2 * k);
          for (int below = 0; below < 2; ++below) {
            sums->value[j][below * 2 + beside] += left[below][chunk * 8 + k] * factor;
          }
        }
      }
    }
  }
  if (lane == 0) {
    for (int row = 0; row < kColumns; ++row) {
      for (int chunk = 0; chunk < 2; ++chunk) {
        const unsigned char* bytes = chunk_of(b, row, chunk);
        product.rows.push_back(bytes);
        product.own_b.insert(product.own_b.end(), bytes, bytes + 16);
      }
    }
    if (thread_number() % 128 == 0) {  // the warpgroup reads b once, 128 bytes at a time
      for (int row = 0; row < kColumns; row += 4) {
        traffic::shared(dynamic_buffer.data() + row * 32, 128, traffic::Kind::kMatrix, file, line);
      }
    }
  }
  own.pending.push_back(std::move(product));
}

// Complete all but the last `pending_groups` groups.
inline void wait_for_products(int pending_groups) {
  Products& own = products[thread_number()];
  const auto ends = [&](const Product& product) { return product.group < own.group - pending_groups; };
  for (const Product& product : own.pending) {
    if (!ends(product)) continue;
    if (std::memcmp(product.a, product.own_a, sizeof(product.own_a))) {
      throw std::runtime_error("wgmma: a changed before the wait");
    }
    for (size_t i = 0; i < product.rows.size(); ++i) {
      if (std::memcmp(product.rows[i], &product.own_b[16 * i], 16)) {
        throw std::runtime_error("wgmma: b changed before the wait");
      }
    }
  }
  own.pending.erase(std::remove_if(own.pending.begin(), own.pending.end(), ends), own.pending.end());
  const auto is_done = [&](const Sums& sums) {
    return std::none_of(own.pending.begin(), own.pending.end(), [&](const Product& one) { return one.c == sums.c; });
  };
  for (const Sums& sums : own.sums) {
    if (is_done(sums)) std::memcpy(sums.c, sums.value, sizeof(sums.value));
  }
  own.sums.erase(std::remove_if(own.sums.begin(), own.sums.end(), is_done), own.sums.end());
}

}  // namespace emulated
