// Device utilities of all kernels: conversions of three precisions, 16-byte loads, warp reductions and checked
// launches. Without nvcc, tests/cuda_on_cpu provides CUDA's names.
#pragma once

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#else
#include "cuda_on_cpu.h"
#endif

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "launch.h"

namespace bkd {

namespace {

using Half = __half;
using BFloat = __nv_bfloat16;

constexpr int kWarpSize = 32;
constexpr uint32_t kAll = 0xffffffffu;

__device__ __forceinline__ float wide(float x) { return x; }
__device__ __forceinline__ float wide(Half x) { return __half2float(x); }
__device__ __forceinline__ float wide(BFloat x) { return __bfloat162float(x); }

template <class T>
__device__ __forceinline__ T narrow(float x);
template <>
__device__ __forceinline__ float narrow<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ Half narrow<Half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ BFloat narrow<BFloat>(float x) {
  return __float2bfloat16_rn(x);
}

// Call call(T{}) for the element type T.
template <class Call>
void dispatch(Type type, const Call& call) {
  if (type == Type::kHalf) return call(Half{});
  if (type == Type::kBFloat) return call(BFloat{});
  call(float{});
}

// Elements, loaded or stored at once.
template <class T, int kEach>
struct alignas(kEach * sizeof(T)) Vec {
  T value[kEach];
};
template <class T>
using Vec2 = Vec<T, 2>;

// 16 bytes of elements, loaded or stored at once.
template <class T>
struct alignas(16) Pack {
  static constexpr int kCount = 16 / sizeof(T);
  T value[kCount];

  // Elements 2 i and 2 i + 1 of two bytes each, as they are.
  __device__ __forceinline__ uint32_t word(int i) const {
    uint32_t bits;
    memcpy(&bits, &value[2 * i], 4);
    return bits;
  }
  __device__ __forceinline__ void set_word(int i, uint32_t bits) { memcpy(&value[2 * i], &bits, 4); }
  // Elements 2 i and 2 i + 1: a paired conversion costs no more than a single one.
  __device__ __forceinline__ float2 pair(int i) const {
#if defined(__CUDACC__)
    if constexpr (std::is_same<T, BFloat>::value) {
      const uint32_t both = reinterpret_cast<const uint32_t*>(value)[i];  // a bfloat16 is the upper half of a float
      return make_float2(__uint_as_float(both << 16), __uint_as_float(both & 0xffff0000u));
    } else if constexpr (std::is_same<T, Half>::value) {
      return __half22float2(reinterpret_cast<const __half2*>(value)[i]);
    }
#endif
    return make_float2(wide(value[2 * i]), wide(value[2 * i + 1]));
  }
  __device__ __forceinline__ void set_pair(int i, float2 x) {
#if defined(__CUDACC__)
    if constexpr (std::is_same<T, BFloat>::value) {
      reinterpret_cast<__nv_bfloat162*>(value)[i] = __float22bfloat162_rn(x);
      return;
    } else if constexpr (std::is_same<T, Half>::value) {
      reinterpret_cast<__half2*>(value)[i] = __float22half2_rn(x);
      return;
    }
#endif
    value[2 * i] = narrow<T>(x.x);
    value[2 * i + 1] = narrow<T>(x.y);
  }
};

#if defined(__CUDACC__)
#define BKD_SEEN
#define BKD_SEE(memory, address, bytes, kind)
#else  // the emulation counts memory traffic by source line
#define BKD_SEEN , EMULATED_HERE
#define BKD_SEE(memory, address, bytes, kind) \
  emulated::traffic::memory(address, bytes, emulated::traffic::Kind::kind, file, line)
#endif

template <class V>
__device__ __forceinline__ V load(const void* from BKD_SEEN) {
  BKD_SEE(global, from, sizeof(V), kLoad);
  return *static_cast<const V*>(from);
}
template <class V>
__device__ __forceinline__ void store(void* to, V value BKD_SEEN) {
  BKD_SEE(global, to, sizeof(V), kStore);
  *static_cast<V*>(to) = value;
}
template <class V>
__device__ __forceinline__ V load_shared(const void* from BKD_SEEN) {
  BKD_SEE(shared, from, sizeof(V), kLoad);
  return *static_cast<const V*>(from);
}
template <class V>
__device__ __forceinline__ void store_shared(void* to, V value BKD_SEEN) {
  BKD_SEE(shared, to, sizeof(V), kStore);
  *static_cast<V*>(to) = value;
}
template <class V>
__device__ __forceinline__ void add_atomic(V* to, V value BKD_SEEN) {
  BKD_SEE(global, to, sizeof(V), kAtomic);
  atomicAdd(to, value);
}

// Load an element of type float or T.
template <class T>
__device__ __forceinline__ float load_either(const void* base, int64_t index, bool is_float BKD_SEEN) {
#if defined(__CUDACC__)
  return is_float ? load<float>(static_cast<const float*>(base) + index)
                  : wide(load<T>(static_cast<const T*>(base) + index));
#else
  return is_float ? load<float>(static_cast<const float*>(base) + index, file, line)
                  : wide(load<T>(static_cast<const T*>(base) + index, file, line));
#endif
}

// Sum over groups of `kLanes` adjacent lanes; every lane gets the result.
template <int kLanes = kWarpSize>
__device__ __forceinline__ float sum_lanes(float x) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAll, x, step);
  return x;
}

template <int kLanes = kWarpSize>
__device__ __forceinline__ float max_lanes(float x) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kAll, x, step));
  return x;
}

// Static shared memory of a type; above 48 KB, or sized by the launch, it is dynamic.
#if defined(__CUDACC__)
#define BKD_SHARED(Type, name) __shared__ __align__(128) Type name
#else
#define BKD_SHARED(Type, name) Type& name = emulated::shared<Type>()
#endif
__device__ __forceinline__ unsigned char* dynamic_shared() {
#if defined(__CUDACC__)
  extern __shared__ __align__(1024) unsigned char shared_buffer[];  // as swizzled tiles of wgmma have it
  return shared_buffer;
#else
  return emulated::dynamic_buffer.data();
#endif
}

// Shared memory as an origin and the place of the dynamic part, which an offset may contain: one register less to add.
#if defined(__CUDACC__)
__device__ __forceinline__ unsigned char* shared_origin() {
  uint32_t zero;
  asm("mov.b32 %0, 0;" : "=r"(zero));  // no null pointer
  return static_cast<unsigned char*>(__cvta_shared_to_generic(zero));
}
__device__ __forceinline__ int dynamic_offset() { return static_cast<int>(__cvta_generic_to_shared(dynamic_shared())); }
#else
inline unsigned char* shared_origin() { return dynamic_shared(); }
constexpr int dynamic_offset() { return 0; }
#endif

constexpr int kMaxGrid = 65535;  // blocks along y, and along z
inline int64_t blocks_for(int64_t count, int64_t each) { return (count + each - 1) / each; }

// Launch a kernel; an empty grid is a no-op. Throws std::runtime_error if the launch fails.
template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), int64_t x, int64_t y, int64_t z, int threads, size_t shared,
            const Device& device, A... arguments) {
  if (x == 0 || y == 0 || z == 0) return;
  if (x > 0x7fffffff || y > kMaxGrid || z > kMaxGrid) {
    throw std::runtime_error(std::string("bkd_fast: ") + name + " needs more blocks than a grid has");
  }
  const dim3 grid{static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z)};
#if defined(__CUDACC__)
  // A pending error is not this kernel's; leave it in place.
  cudaError_t state = cudaPeekAtLastError();
  if (state != cudaSuccess) {
    throw std::runtime_error(std::string("bkd_fast: before ") + name +
                             " was launched, an earlier CUDA call had failed: " + cudaGetErrorString(state));
  }
  if (shared > 48 * 1024) {  // beyond the default limit, opt in
    if (shared > static_cast<size_t>(device.shared_per_block)) {
      throw std::runtime_error(std::string("bkd_fast: ") + name + " needs " + std::to_string(shared) +
                               " bytes of shared memory, this device has " + std::to_string(device.shared_per_block));
    }
    state = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  }
  if (state == cudaSuccess) {
    kernel<<<grid, threads, shared, static_cast<cudaStream_t>(device.stream)>>>(arguments...);
    state = cudaGetLastError();
  }
  if (state != cudaSuccess) {
    throw std::runtime_error(std::string("bkd_fast: ") + name + " could not be launched: " + cudaGetErrorString(state));
  }
#else
  (void)device;
  emulated::launch(name, kernel, grid, threads, shared, arguments...);
#endif
}

}  // namespace
}  // namespace bkd
