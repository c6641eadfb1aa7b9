// The subset of CUDA C++ that csrc/cuda uses, for a C++ compiler; fibers.h runs the threads on the CPU.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "device.h"
#include "fibers.h"
#include "traffic.h"

#ifndef BKD_ARCH
#define BKD_ARCH 800  // emulated compute capability
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define EMULATED_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
using cudaStream_t = void*;

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

// Half precision: stored as on a device, rounded to nearest even.
struct __half {
  _Float16 value;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __half2float(__half x) { return static_cast<float>(x.value); }
inline __half __float2half_rn(float x) { return {static_cast<_Float16>(x)}; }
inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

namespace emulated {

inline constexpr size_t kShared = 227 * 1024;  // max per block
inline dim3 block_index, block_size, grid_size;
// Sized by the launch, so that AddressSanitizer catches overruns.
inline std::vector<unsigned char> dynamic_buffer;
// Static shared memory: one buffer per type, since blocks run one after another.
inline std::vector<std::pair<void*, size_t>> static_buffers;
template <class T>
T& shared() {
  struct Buffer {
    alignas(128) unsigned char bytes[sizeof(T)];
    Buffer() {
      std::memset(bytes, 0xff, sizeof(T));
      static_buffers.emplace_back(bytes, sizeof(T));
    }
  };
  static Buffer buffer;
  return *reinterpret_cast<T*>(buffer.bytes);
}

struct Pending {
  void* target;
  const void* source;  // null: zeros
  int bytes, group;
};
// cp.async in flight; data arrives only at the wait.
struct Copies {
  std::vector<Pending> pending;
  int group = 0;
};
inline std::vector<Copies> copies(kMaxThreads);

// cp.async.bulk in flight: data arrives when a thread waits for the barrier.
struct BulkCopy {
  void* target;
  const void* source;
  int bytes;
  void* barrier;
};
inline std::vector<BulkCopy> bulk_copies;

// wgmma in flight: the accumulators are NaN until the wait, and a and b must stay.
struct Product {
  float (*c)[4];
  const uint32_t* a;
  uint32_t own_a[4];
  std::vector<const unsigned char*> rows;  // of b, 16 bytes each; seen by one lane of a warp
  std::vector<unsigned char> own_b;
  int group;
};
struct Sums {
  float (*c)[4];
  float value[16][4];
};
struct Products {
  std::vector<Product> pending;
  std::vector<Sums> sums;
  int group = 0;
  bool begun = false;
};
inline std::vector<Products> products(kMaxThreads);

struct ThreadIndex {
  operator dim3() const { return {static_cast<unsigned>(thread_number()), 0, 0}; }
  struct X {
    operator unsigned() const { return static_cast<unsigned>(thread_number()); }
  } x;
};
inline const ThreadIndex thread_index;

// Block size, dynamic shared memory and number of blocks of every launched kernel, for tests.
struct Launched {
  int threads;
  size_t shared;
  long long blocks;
};
inline std::map<std::string, Launched> launched;

template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), dim3 grid, int threads, size_t shared, A... arguments) {
  if (!grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535 || grid.x > 0x7fffffffu) {
    throw std::runtime_error("a grid has 1 to 2^31 - 1 by 65535 by 65535 blocks");
  }
  if (shared > kShared) throw std::runtime_error("more shared memory than a block can have");
  launched[name] = {threads, shared, static_cast<long long>(grid.x) * grid.y * grid.z};
  if (dry) return;
  grid_size = grid;
  block_size = {static_cast<unsigned>(threads), 1, 1};
  const std::function<void()> body = [&] { kernel(arguments...); };
  dynamic_buffer.resize(shared);
  dynamic_buffer.shrink_to_fit();
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        block_index = {x, y, z};
        // NaN in every type, to expose reads of uninitialized shared memory.
        std::fill(dynamic_buffer.begin(), dynamic_buffer.end(), 0xff);
        for (auto& [buffer, bytes] : static_buffers) std::memset(buffer, 0xff, bytes);
        for (Copies& own : copies) own = {};
        for (Products& own : products) own = {};
        bulk_copies.clear();
        run_block(threads, body);
        if (!bulk_copies.empty()) throw std::runtime_error("a block ended before its bulk copies arrived");
        for (const Products& own : products) {
          if (!own.pending.empty()) throw std::runtime_error("a block ended before its products");
        }
        traffic::end_block();
      }
    }
  }
}

}  // namespace emulated

#define threadIdx emulated::thread_index
#define blockIdx emulated::block_index
#define blockDim emulated::block_size
#define gridDim emulated::grid_size

inline void __syncthreads(EMULATED_HERE) { emulated::wait_for_block(file, line); }
inline void __syncwarp(EMULATED_HERE) { emulated::wait_for_warp("", 1, file, line); }

// Warp shuffles, with a full mask only: kernels use no other.
template <class T>
T emulated_lane(uint32_t mask, T value, int source, const char* file, int line) {
  if (mask != 0xffffffffu) throw std::runtime_error("warp functions need a full mask");
  const std::byte* shown = emulated::wait_for_warp(&value, sizeof(T), file, line);
  T result;
  std::memcpy(&result, shown + source * emulated::kLaneBytes, sizeof(T));
  return result;
}
template <class T>
T __shfl_sync(uint32_t mask, T value, int source, EMULATED_HERE) {
  return emulated_lane(mask, value, source & 31, file, line);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, EMULATED_HERE) {
  return emulated_lane(mask, value, (emulated::thread_number() & 31) ^ bits, file, line);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, int by, EMULATED_HERE) {
  const int lane = emulated::thread_number() & 31;
  return emulated_lane(mask, value, lane + by < 32 ? lane + by : lane, file, line);
}
inline uint32_t __ballot_sync(uint32_t mask, bool value, EMULATED_HERE) {
  if (mask != 0xffffffffu) throw std::runtime_error("warp functions need a full mask");
  const std::byte* shown = emulated::wait_for_warp(&value, 1, file, line);
  uint32_t bits = 0;
  for (int lane = 0; lane < 32; ++lane) {
    bits |= static_cast<uint32_t>(std::to_integer<int>(shown[lane * emulated::kLaneBytes])) << lane;
  }
  return bits;
}
inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __any_sync(uint32_t mask, bool value, EMULATED_HERE) { return __ballot_sync(mask, value, file, line) != 0; }
inline int __syncthreads_or(bool value, EMULATED_HERE) {
  static bool any;
  emulated::wait_for_block(file, line);
  any = false;
  emulated::wait_for_block(file, line);
  any |= value;
  emulated::wait_for_block(file, line);
  return any;
}

template <class T>
T atomicAdd(T* target, T value) {
  const T before = *target;
  *target = before + value;
  return before;
}

inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline long long __float2ll_rn(float x) { return std::llrint(x); }
inline int __float_as_int(float x) {
  int bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float __int_as_float(int bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
using std::max;
using std::min;
