// Emulation of the PTX in csrc/cuda/instructions.cuh: ldmatrix, mma.sync and cp.async, with the fragment layouts of the
// PTX manual.
#pragma once

#include "cuda_on_cpu.h"

namespace emulated {

// Each lane passes the address of a row of eight 16-bit elements; four matrices of eight rows.
// Lane l gets word l % 4 of row l / 4; transposed: elements 2 (l % 4) and the next of column l / 4.
inline void load_matrices(uint32_t (&result)[4], const void* row, bool transposed, EMULATED_HERE) {
  if (reinterpret_cast<uintptr_t>(row) % 16) throw std::runtime_error("ldmatrix: a row is not aligned to 16 bytes");
  traffic::shared(row, 16, traffic::Kind::kMatrix, file, line);
  const std::byte* shown = wait_for_warp(row, 16, file, line);
  const int lane = thread_number() % kWarp;
  for (int matrix = 0; matrix < 4; ++matrix) {
    const std::byte* rows = shown + matrix * 8 * kLaneBytes;
    if (transposed) {
      uint16_t pair[2];
      for (int i = 0; i < 2; ++i) std::memcpy(&pair[i], rows + (lane % 4 * 2 + i) * kLaneBytes + lane / 4 * 2, 2);
      std::memcpy(&result[matrix], pair, 4);
    } else {
      std::memcpy(&result[matrix], rows + lane / 4 * kLaneBytes + lane % 4 * 4, 4);
    }
  }
}

template <class T>
float number(const std::byte* bits);
template <>
inline float number<__half>(const std::byte* bits) {
  __half x;
  std::memcpy(&x, bits, 2);
  return __half2float(x);
}
template <>
inline float number<__nv_bfloat16>(const std::byte* bits) {
  __nv_bfloat16 x;
  std::memcpy(&x, bits, 2);
  return __bfloat162float(x);
}
// TF32: tensor cores read ten mantissa bits of a float.
template <>
inline float number<float>(const std::byte* bits) {
  uint32_t x;
  std::memcpy(&x, bits, 4);
  x &= ~0x1fffu;
  float value;
  std::memcpy(&value, &x, 4);
  return value;
}

inline float rounded_to_tf32(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7f800000u) != 0x7f800000u) bits = (bits + 0x1000u) & ~0x1fffu;  // ties away from zero
  std::memcpy(&x, &bits, 4);
  return x;
}

// c += a b for a of 16 rows, b of 8 columns and `kSteps` times 16 bytes of depth.
// a: registers (row l / 4, first 16 bytes), (row + 8, first), (row, second), (row + 8, second); b: first, second.
template <class T, int kSteps>
void multiply(float (&c)[4], const uint32_t* a, const uint32_t* b, EMULATED_HERE) {
  uint32_t own[6] = {};
  std::memcpy(own, a, kSteps * 8);
  std::memcpy(own + 4, b, kSteps * 4);
  const std::byte* shown = wait_for_warp(own, sizeof(own), file, line);
  const int lane = thread_number() % kWarp;
  constexpr int kEach = 4 / sizeof(T);  // elements per register
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4, column = lane % 4 * 2 + i % 2, below = i / 2;
    float sum = c[i];
    for (int step = 0; step < kSteps; ++step) {
      for (int word = 0; word < 4; ++word) {
        const std::byte* left = shown + (row * 4 + word) * kLaneBytes + (step * 2 + below) * 4;
        const std::byte* right = shown + (column * 4 + word) * kLaneBytes + (4 + step) * 4;
        for (int k = 0; k < kEach; ++k) {
          sum += number<T>(left + k * sizeof(T)) * number<T>(right + k * sizeof(T));
        }
      }
    }
    c[i] = sum;
  }
}

// red of four floats; from 9.0.
inline void add_vector(float* target, float4 value) {
  if (BKD_ARCH < 900) throw std::runtime_error("red: this device adds no vectors");
  if (reinterpret_cast<uintptr_t>(target) % 16) throw std::runtime_error("red: an address is not aligned to 16 bytes");
  target[0] += value.x, target[1] += value.y, target[2] += value.z, target[3] += value.w;
}

// fma.rn.f16x2 and .bf16x2: products of such numbers are exact in double precision.
inline __half rounded(double x, __half) { return {static_cast<_Float16>(x)}; }
inline __nv_bfloat16 rounded(double x, __nv_bfloat16) { return __float2bfloat16_rn(static_cast<float>(x)); }
template <class T>
uint32_t multiply_add(uint32_t a, uint32_t b, uint32_t c) {
  T x[2], y[2], z[2];
  std::memcpy(x, &a, 4), std::memcpy(y, &b, 4), std::memcpy(z, &c, 4);
  const auto wide = [](const T& value) {
    return static_cast<double>(number<T>(reinterpret_cast<const std::byte*>(&value)));
  };
  for (int i = 0; i < 2; ++i) z[i] = rounded(wide(x[i]) * wide(y[i]) + wide(z[i]), T{});
  std::memcpy(&c, z, 4);
  return c;
}

// cp.async of 16 bytes (or zeros); until the wait the target holds NaN.
inline void copy_async(void* target, const void* source, bool valid, EMULATED_HERE) {
  if (reinterpret_cast<uintptr_t>(target) % 16 || (valid && reinterpret_cast<uintptr_t>(source) % 16)) {
    throw std::runtime_error("cp.async: an address is not aligned to 16 bytes");
  }
  if (valid) traffic::global(source, 16, traffic::Kind::kLoad, file, line);
  traffic::shared(target, 16, traffic::Kind::kStore, file, line);
  std::memset(target, 0xff, 16);
  Copies& own = copies[thread_number()];
  own.pending.push_back({target, valid ? source : nullptr, 16, own.group});
}
inline void commit_copies() { ++copies[thread_number()].group; }
// Complete all but the last `pending_groups` groups.
inline void wait_copies(int pending_groups) {
  Copies& own = copies[thread_number()];
  auto arrives = [&](const Pending& copy) { return copy.group < own.group - pending_groups; };
  for (const Pending& copy : own.pending) {
    if (!arrives(copy)) continue;
    if (copy.source) {
      std::memcpy(copy.target, copy.source, copy.bytes);
    } else {
      std::memset(copy.target, 0, copy.bytes);
    }
  }
  own.pending.erase(std::remove_if(own.pending.begin(), own.pending.end(), arrives), own.pending.end());
}

}  // namespace emulated
