// Wrappers of wgmma, mbarrier and cp.async.bulk, which compute capability 9.0a has (code for it runs on 9.0 alone).
// tests/cuda_on_cpu/emulation/wgmma.h emulates them on the CPU.
#pragma once

#include "tile.cuh"

#if !defined(__CUDACC__)
#include "wgmma.h"
#define BKD_WGMMA 1
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define BKD_WGMMA 1
#else
#define BKD_WGMMA 0
#endif

namespace bkd {
namespace {

constexpr int kWarpgroup = 128;  // threads that multiply together

#if BKD_WGMMA

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
#if defined(__CUDACC__)
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
#else
  return emulated::shared_address(pointer);
#endif
}

// mbarrier: a phase ends when `count` threads have arrived and all bytes that were expected have been copied. A
// `Barrier` is in shared memory.
using Barrier = uint64_t;

__device__ __forceinline__ void init_barrier(Barrier* barrier, int count) {
#if defined(__CUDACC__)
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
#else
  emulated::init_barrier(barrier, count);
#endif
}
// Between the initialization and a barrier of the block: copies see initialized barriers.
__device__ __forceinline__ void publish_barriers() {
#if defined(__CUDACC__)
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
__device__ __forceinline__ void arrive(Barrier* barrier) {
#if defined(__CUDACC__)
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
#else
  emulated::arrive(barrier, 0);
#endif
}
// Arrive, and expect bytes to be copied before the phase ends.
__device__ __forceinline__ void arrive_expecting(Barrier* barrier, int bytes) {
#if defined(__CUDACC__)
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
#else
  emulated::arrive(barrier, bytes);
#endif
}
// Wait until the phase of this parity (0 for the first, 1 for the second, ...) has ended.
__device__ __forceinline__ void wait_for_phase(Barrier* barrier, int parity BKD_SEEN) {
#if defined(__CUDACC__)
  asm volatile(
      "{\n.reg .pred done;\nagain:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
#else
  emulated::wait_for_phase(barrier, parity, file, line);
#endif
}
// Copy whole 16 bytes from global to shared memory; the barrier counts them when they have arrived.
__device__ __forceinline__ void copy_bulk(void* target, const void* source, int bytes, Barrier* barrier BKD_SEEN) {
#if defined(__CUDACC__)
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(target)),
               "l"(__cvta_generic_to_global(source)), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
#else
  emulated::copy_bulk(target, source, bytes, barrier, file, line);
#endif
}

// Descriptor of an operand of wgmma: rows of 64 bytes of depth with chunks swizzled as in Tile, from a multiple of 512
// bytes. 32 bytes more are the second half of the depth.
__device__ __forceinline__ uint64_t descriptor(const void* tile) {
  constexpr uint64_t kSwizzle64 = 2, kEightRows = 8 * kDepthBytes;
  return kSwizzle64 << 62 | kEightRows / 16 << 32 | uint64_t{1} << 16 | (shared_address(tile) & 0x3ffff) / 16;
}

// Before the products of a group: what registers hold is visible to them.
__device__ __forceinline__ void begin_products() {
#if defined(__CUDACC__)
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#else
  emulated::begin_products();
#endif
}
__device__ __forceinline__ void commit_products() {
#if defined(__CUDACC__)
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
  emulated::commit_products();
#endif
}
// Wait until at most the last `kPending` groups are being multiplied.
template <int kPending>
__device__ __forceinline__ void wait_for_products() {
#if defined(__CUDACC__)
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#else
  emulated::wait_for_products(kPending);
#endif
}

// wgmma: c += a b for 64 rows of a, 128 columns of b, 32 bytes of depth. Warp w of the warpgroup has rows 16 w to
// 16 w + 15 of a and c, in the layout of multiply(); c[j] are columns 8 j to 8 j + 7. Neither c, a nor b may change
// before the wait.
template <class T>
__device__ __forceinline__ void multiply_async(float (*c)[4], const uint32_t (&a)[4], uint64_t b BKD_SEEN) {
#if !defined(__CUDACC__)
  emulated::multiply_async<T>(c, a, b, file, line);
#else
#define BKD_C(j) "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])
#define BKD_MULTIPLY(type)                                                                                           \
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                                          \
               " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "                  \
               "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, "               \
               "%35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, "               \
               "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, {%64, %65, %66, %67}, "                 \
               "%68, 1, 1, 1, 0;"                                                                                    \
               : BKD_C(0), BKD_C(1), BKD_C(2), BKD_C(3), BKD_C(4), BKD_C(5), BKD_C(6), BKD_C(7), BKD_C(8), BKD_C(9), \
                 BKD_C(10), BKD_C(11), BKD_C(12), BKD_C(13), BKD_C(14), BKD_C(15)                                    \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
  if constexpr (std::is_same<T, BFloat>::value) {
    BKD_MULTIPLY("bf16");
  } else {
    BKD_MULTIPLY("f16");
  }
#undef BKD_MULTIPLY
#undef BKD_C
#endif
}

#endif  // BKD_WGMMA

}  // namespace
}  // namespace bkd
