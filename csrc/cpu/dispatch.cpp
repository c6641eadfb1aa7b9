#include "dispatch.h"

#include <string>

namespace bkd {
namespace {

std::string name_of(Tier tier) {
  constexpr const char* NAMES[] = {"portable", "avx2", "avx512", "avx512bf16"};
  return NAMES[static_cast<int>(tier)];
}

std::string cpu_tiers() {
  std::string names;
  for (const Tier tier : tiers()) names += (names.empty() ? "" : " ") + name_of(tier);
  return names;
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
  return tiers()[index];
}

// One worker a thread; each takes tasks until there are none, so that no thread waits for a slow one.
void run_parallel(int64_t tasks, Worker worker, const void* data) {
  TaskQueue queue(tasks);
  const int64_t threads = torch::stable::get_num_threads();
  torch::stable::parallel_for(0, tasks < threads ? tasks : threads, 1, [&](int64_t, int64_t) { worker(queue, data); });
}

}  // namespace bkd

STABLE_TORCH_LIBRARY_FRAGMENT(bkd_fast_native, m) { m.def("cpu_tiers() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(bkd_fast_native, CompositeExplicitAutograd, m) {
  m.impl("cpu_tiers", TORCH_BOX(&bkd::cpu_tiers));
}
