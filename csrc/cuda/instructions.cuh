// Wrappers of ldmatrix, mma.sync and cp.async. tests/cuda_on_cpu/emulation/instructions.h emulates them on the CPU.
#pragma once

#include "device.cuh"

#if defined(__CUDACC__)
#if defined(__CUDA_ARCH__)
#define BKD_ARCH __CUDA_ARCH__
#else
#define BKD_ARCH 0  // the host's pass over the file
#endif
#else
#include "instructions.h"
#endif

namespace bkd {
namespace {

// Element types that tensor cores support: on Turing only float16.
template <class T>
constexpr bool kHasTensorCores =
    BKD_ARCH >= 800 || (BKD_ARCH >= 750 && sizeof(T) == 2 && !std::is_same<T, BFloat>::value);

// Whether four floats in memory can be added to at once.
constexpr bool kHasVectorAtomics = BKD_ARCH >= 900;

// Add to four adjacent floats, aligned to 16 bytes, at once.
__device__ __forceinline__ void add_atomic(float* to, float4 value BKD_SEEN) {
#if !defined(__CUDACC__)
  BKD_SEE(global, to, sizeof(value), kAtomic);
  emulated::add_vector(to, value);
#elif BKD_ARCH >= 900
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
               "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w)
               : "memory");
#endif
}

// ldmatrix: four 8 x 8 matrices of 16-bit elements (or 8 x 4 floats) from shared memory. Lanes 8 i to 8 i + 7 pass the
// row addresses of matrix i. Lane l gets word l % 4 of row l / 4 or, transposed, elements 2 (l % 4) and the next of
// column l / 4.
template <bool kTransposed = false>
__device__ __forceinline__ void load_matrices(uint32_t (&result)[4], const void* row BKD_SEEN) {
#if defined(__CUDACC__)
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
                 : "r"(address)
                 : "memory");
  }
#else
  emulated::load_matrices(result, row, kTransposed, file, line);
#endif
}

// mma: c += a b with 16 rows of a, 8 columns of b, 32 bytes of depth (16 halves, 8 floats).
// c: (row l / 4, columns 2 (l % 4), + 1), (row l / 4 + 8, the same).
template <class T>
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b) {
#if defined(__CUDACC__)
#if BKD_ARCH >= 800
  if constexpr (sizeof(T) == 4) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else if constexpr (std::is_same<T, BFloat>::value) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#elif BKD_ARCH >= 750
  for (int half = 0; half < 2; ++half) {  // 16 bytes of depth at a time
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
  }
#endif
#else
  if constexpr (BKD_ARCH >= 800) {
    emulated::multiply<T, 2>(c, a, b);
  } else {
    for (int half = 0; half < 2; ++half) emulated::multiply<T, 1>(c, a + 2 * half, b + half);
  }
#endif
}

// Round a float to TF32, to nearest.
__device__ __forceinline__ float rounded_to_tf32(float x) {
#if defined(__CUDACC__)
#if BKD_ARCH >= 800
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return __uint_as_float(bits);
#else
  return x;
#endif
#else
  return emulated::rounded_to_tf32(x);
#endif
}

// A sum that is multiplied by this, and of whose lower 13 bits tensor cores take no notice, is as good as rounded to
// TF32: a number of TF32 stays, and for others the mean error is 0 if mantissas are distributed by Benford's law. With
// the factor in the weights, no instruction rounds.
constexpr float kTf32Rounding = 1 + 0.693147f / 2048;

// Zeros to read in place of what lies outside, which takes fewer instructions than clearing registers.
#if defined(__CUDACC__)
__device__ const uint4 kZeros{};
#endif

// Load 16 bytes at base + index * stride, or zeros for kOutside and if not `valid`. The memory does not change while
// the kernel runs. The compiler takes registers that are written under predicates for occupied before, in a loop all
// the time. kReuse: since `result` was written last.
constexpr uint32_t kOutside = 0xffffffffu;
template <bool kReuse, class V>
__device__ __forceinline__ void load_indexed(V& result, const void* base, uint32_t index, uint32_t stride,
                                             bool valid BKD_SEEN) {
  static_assert(sizeof(V) == 16, "one vector");
#if defined(__CUDACC__)
  uint32_t word[4];
  const int inside = index != kOutside && valid;
  // mad with a carry is one IMAD.WIDE; mad.wide would be that and an addition of two instructions.
#define BKD_LOAD_INDEXED(constraint)                                                                          \
  asm("{\n\t.reg .pred inside;\n\t.reg .u32 low, high;\n\t.reg .u64 from;\n\t"                                \
      "mov.b64 {low, high}, %6;\n\t"                                                                          \
      "setp.ne.s32 inside, %8, 0;\n\t"                                                                        \
      "mad.lo.cc.u32 low, %4, %5, low;\n\t"                                                                   \
      "madc.hi.u32 high, %4, %5, high;\n\t"                                                                   \
      "mov.b64 from, {low, high};\n\t"                                                                        \
      "@inside ld.global.nc.v4.b32 {%0, %1, %2, %3}, [from];\n\t"                                             \
      "@!inside ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%7];\n\t}"                                             \
      : constraint(word[0]), constraint(word[1]), constraint(word[2]), constraint(word[3])                    \
      : "r"(index), "r"(stride), "l"(__cvta_generic_to_global(base)), "l"(__cvta_generic_to_global(&kZeros)), \
        "r"(inside))
  if constexpr (kReuse) {
    memcpy(word, &result, 16);
    BKD_LOAD_INDEXED("+r");
  } else {
    BKD_LOAD_INDEXED("=r");
  }
#undef BKD_LOAD_INDEXED
  memcpy(&result, word, 16);
#else
  const char* from = static_cast<const char*>(base) + uint64_t{index} * stride;
  result = index == kOutside || !valid ? V{} : load<V>(from, file, line);
#endif
}

// a b + c for two numbers of 16 bits at once, each rounded once. bfloat16 from 8.0.
template <class T>
__device__ __forceinline__ uint32_t multiply_add(uint32_t a, uint32_t b, uint32_t c) {
#if !defined(__CUDACC__)
  return emulated::multiply_add<T>(a, b, c);
#else
  uint32_t result = 0;
  if constexpr (std::is_same<T, Half>::value) {
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  } else {
#if BKD_ARCH >= 800
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
#endif
  }
  return result;
#endif
}
// A pair of equal numbers of 16 bits.
template <class T>
__device__ __forceinline__ uint32_t equal_pair(float x) {
  const T both[2] = {narrow<T>(x), narrow<T>(x)};
  uint32_t bits;
  memcpy(&bits, both, 4);
  return bits;
}

// Keep a value in registers: the compiler would mix it with what changes in a loop, and work it out there again.
__device__ __forceinline__ void keep(int& value) {
#if defined(__CUDACC__)
  asm("" : "+r"(value));
#else
  (void)value;
#endif
}
template <class T>
__device__ __forceinline__ void keep(const T*& pointer) {
#if defined(__CUDACC__)
  asm("" : "+l"(pointer));
#else
  (void)pointer;
#endif
}

// At `end` go back to `begin` and count. The compiler takes six instructions for these three.
__device__ __forceinline__ void wrap_at(int end, int begin, int& value, int& count) {
#if defined(__CUDACC__)
  asm("{\n\t.reg .pred ended;\n\t"
      "setp.ge.s32 ended, %0, %2;\n\t"
      "@ended mov.b32 %0, %3;\n\t"
      "@ended add.s32 %1, %1, 1;\n\t}"
      : "+r"(value), "+r"(count)
      : "r"(end), "r"(begin));
#else
  if (value >= end) value = begin, ++count;
#endif
}

// cp.async: copy 16 bytes from global to shared memory, zeros if not `valid`. Visible after commit, wait and a barrier.
__device__ __forceinline__ void copy_async(void* target, const void* source, bool valid BKD_SEEN) {
#if !defined(__CUDACC__)
  if constexpr (BKD_ARCH >= 800) {
    emulated::copy_async(target, source, valid, file, line);
  } else {
    store_shared(target, valid ? load<uint4>(source, file, line) : make_uint4(0, 0, 0, 0), file, line);
  }
#elif BKD_ARCH >= 800
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(target))),
      "l"(source), "r"(valid ? 16 : 0)
      : "memory");
#else
  store_shared(target, valid ? load<uint4>(source) : make_uint4(0, 0, 0, 0));
#endif
}
__device__ __forceinline__ void commit_copies() {
#if !defined(__CUDACC__)
  emulated::commit_copies();
#elif BKD_ARCH >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Wait until at most the last `kPending` groups of this thread are in flight.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
#if !defined(__CUDACC__)
  emulated::wait_copies(kPending);
#elif BKD_ARCH >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

}  // namespace
}  // namespace bkd
