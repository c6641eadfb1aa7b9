// What the bindings of an operator and its kernels share. Kernels are compiled once for each instruction set (tier), in
// a namespace of the tier's name; an operator's table names them by field.
//
// Nothing here may emit code of its own: of a function that several translation units emit the linker keeps one copy,
// which may use instructions that the machine does not have. Members of the argument structs are therefore BKD_INLINE.
#pragma once

#include <atomic>
#include <cstdint>

#define BKD_INLINE inline __attribute__((always_inline))

namespace bkd {

// Hands out task numbers to the threads of one call; whoever is free takes the next, so that a slow core takes fewer.
struct TaskQueue {
  BKD_INLINE explicit TaskQueue(int64_t tasks) : tasks(tasks) {}
  // Return the next task, or -1 after the last.
  BKD_INLINE int64_t next() {
    const int64_t task = taken.fetch_add(1, std::memory_order_relaxed);
    return task < tasks ? task : -1;
  }
  const int64_t tasks;
  std::atomic<int64_t> taken{0};
};

// Run worker(queue, data) on min(threads, tasks) threads; return when all are done.
using Worker = void (*)(TaskQueue& queue, const void* data);
using Parallel = void (*)(int64_t tasks, Worker worker, const void* data);

// What an argument's numbers are: of the type that is computed in, or 16 bits of a float.
enum class Numbers { Same, Half, BFloat };

// The kernel of an operator in each tier. Problem: the struct of its arguments.
template <class Problem>
struct Kernel {
  using Function = void (*)(const Problem&);
  Function portable;
#if defined(__x86_64__)
  Function avx2, avx512;
#endif
};

// Kernels of bfloat16 exist only in tiers that multiply it (*.bfloat.cpp); elsewhere the bindings are given floats.
using BFloat = uint16_t;  // the bits of one
template <class Problem>
struct BFloatKernel {
#if defined(__x86_64__)
  void (*avx512bf16)(const Problem&);
#endif
#if defined(BKD_AMX)
  void (*amx)(const Problem&);
#endif
};

}  // namespace bkd

#define BKD_DECLARE(tier, name, Problem) \
  namespace tier {                       \
  void name(const Problem<float>& p);    \
  void name(const Problem<double>& p);   \
  }
#if defined(__x86_64__)
#define BKD_DECLARE_TIERS(name, Problem) \
  BKD_DECLARE(portable, name, Problem) BKD_DECLARE(avx2, name, Problem) BKD_DECLARE(avx512, name, Problem)
#define BKD_TIERS(name) {portable::name, avx2::name, avx512::name}
#else
#define BKD_DECLARE_TIERS(name, Problem) BKD_DECLARE(portable, name, Problem)
#define BKD_TIERS(name) {portable::name}
#endif
// Declare the kernel `name` in all tiers, and its table name_kernel<float or double>; in namespace bkd of a header.
#define BKD_DECLARE_KERNEL(name, Problem) \
  BKD_DECLARE_TIERS(name, Problem)        \
  template <class T>                      \
  constexpr Kernel<Problem<T>> name##_kernel = BKD_TIERS(name);

// Define the kernel `name` of the tier being compiled by a template of that name; at the end of a *.simd.cpp.
#define BKD_DEFINE_KERNEL(name, Problem)                        \
  namespace BKD_TIER {                                          \
  void name(const Problem<float>& p) { bkd::name<float>(p); }   \
  void name(const Problem<double>& p) { bkd::name<double>(p); } \
  }

// The same for kernels of bfloat16, whose Problem is no template. BKD_AMX: the compiler has the instructions of tiles.
#define BKD_DECLARE_BFLOAT(tier, name, Problem) \
  namespace tier {                              \
  void name(const Problem& p);                  \
  }
#if defined(BKD_AMX)
#define BKD_DECLARE_BFLOAT_KERNEL(name, Problem) \
  BKD_DECLARE_BFLOAT(avx512bf16, name, Problem)  \
  BKD_DECLARE_BFLOAT(amx, name, Problem)         \
  constexpr BFloatKernel<Problem> name##_kernel = {avx512bf16::name, amx::name};
#elif defined(__x86_64__)
#define BKD_DECLARE_BFLOAT_KERNEL(name, Problem) \
  BKD_DECLARE_BFLOAT(avx512bf16, name, Problem)  \
  constexpr BFloatKernel<Problem> name##_kernel = {avx512bf16::name};
#else
#define BKD_DECLARE_BFLOAT_KERNEL(name, Problem) constexpr BFloatKernel<Problem> name##_kernel = {};
#endif
#define BKD_DEFINE_BFLOAT_KERNEL(name, Problem) \
  namespace BKD_TIER {                          \
  void name(const Problem& p) { bkd::name(p); } \
  }
