#include "dispatch.h"

#include <string>

#if defined(BKD_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#endif

namespace bkd {
namespace {

std::string name_of(Tier tier) {
  constexpr const char* NAMES[] = {"portable", "avx2", "avx512", "avx512bf16", "amx"};
  return NAMES[static_cast<int>(tier)];
}

std::string cpu_tiers() {
  std::string names;
  for (const Tier tier : tiers()) names += (names.empty() ? "" : " ") + name_of(tier);
  return names;
}

// What the CPU, or this extension, lacks of the tier amx beside the tier before it; empty where nothing is missing.
std::string without_tiles() {
#if defined(BKD_AMX)
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) edx = 0;
  if (!(edx >> 24 & 1)) return "this CPU has no AMX-TILE";
  return edx >> 22 & 1 ? "" : "this CPU has no AMX-BF16";
#else
  return "the extension was built without AMX, which needs Linux on x86-64 and GCC 11 or clang 12";
#endif
}

// Linux gives tiles to a process that asks, unless a signal stack is too small to save them.
std::string without_permission() {
#if defined(BKD_AMX)
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, TILE_DATA = 18;
  static const int refused = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) ? errno : 0;
  if (refused) return "Linux does not permit tiles (" + std::string(std::strerror(refused)) + ")";
#endif
  return "";
}

// Why the tier amx cannot run; empty if it can. Asks for permission, which a process has to its end.
std::string amx_missing() {
  if (tiers().back() == Tier::amx) return without_permission();
  return tiers().back() == Tier::avx512bf16 ? without_tiles() : "this CPU has no AVX512-BF16";
}

}  // namespace

const std::vector<Tier>& tiers() {
  static const std::vector<Tier> usable = [] {
    std::vector<Tier> all = {Tier::portable};
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))  // and F16C, which all of them have
      all.push_back(Tier::avx2);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw"))
      all.push_back(Tier::avx512);
    if (all.back() == Tier::avx512 && __builtin_cpu_supports("avx512bf16")) all.push_back(Tier::avx512bf16);
    if (all.back() == Tier::avx512bf16 && without_tiles().empty()) all.push_back(Tier::amx);
#endif
    return all;
  }();
  return usable;
}

Tier tier_at(int64_t index) {
  const int64_t last = static_cast<int64_t>(tiers().size()) - 1;
  if (index < 0 || index > last)
    throw std::invalid_argument("bkd_fast: tier is " + std::to_string(index) + ", expected 0 to " +
                                std::to_string(last) + " (" + cpu_tiers() + ")");
  if (tiers()[index] == Tier::amx)
    if (const std::string missing = without_permission(); !missing.empty())
      throw std::invalid_argument("bkd_fast: tier amx: " + missing);
  return tiers()[index];
}

// One worker a thread; each takes tasks until there are none, so that no thread waits for a slow one.
void run_parallel(int64_t tasks, Worker worker, const void* data) {
  TaskQueue queue(tasks);
  const int64_t threads = torch::stable::get_num_threads();
  torch::stable::parallel_for(0, tasks < threads ? tasks : threads, 1, [&](int64_t, int64_t) { worker(queue, data); });
}

}  // namespace bkd

STABLE_TORCH_LIBRARY_FRAGMENT(bkd_fast_native, m) {
  m.def("cpu_tiers() -> str");
  m.def("amx_missing() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(bkd_fast_native, CompositeExplicitAutograd, m) {
  m.impl("cpu_tiers", TORCH_BOX(&bkd::cpu_tiers));
  m.impl("amx_missing", TORCH_BOX(&bkd::amx_missing));
}
