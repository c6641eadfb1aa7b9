#include "dispatch.h"

#include <string>

namespace bkd {

const std::vector<Tier>& tiers() {
  static const std::vector<Tier> found = [] {
    std::vector<Tier> usable = {portable_tier()};
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))  // and F16C, which all of them have
      usable.push_back(avx2_tier());
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw")) {
      usable.push_back(avx512_tier());
      // Summing up across 64 bytes costs more than they save: measured on Zen 4, from 24 to 448 channels.
      usable.back().single.local_match = avx2_tier().single.local_match;
    }
#endif
    return usable;
  }();
  return found;
}

const Tier& tier_at(int64_t index) { return tiers().at(index); }

// One worker a thread; each takes tasks until there are none, so that no thread waits for a slow one.
void run_parallel(int64_t tasks, Worker worker, const void* data) {
  Queue queue(tasks);
  const int64_t threads = torch::stable::get_num_threads();
  torch::stable::parallel_for(0, tasks < threads ? tasks : threads, 1,
                              [&](int64_t, int64_t) { worker(queue, data); });
}

std::string cpu_tiers() {
  std::string names;
  for (const Tier& tier : tiers()) names += (names.empty() ? "" : " ") + std::string(tier.name);
  return names;
}

}  // namespace bkd

STABLE_TORCH_LIBRARY_FRAGMENT(bkd_fast_native, m) {
  m.def("cpu_tiers() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(bkd_fast_native, CompositeExplicitAutograd, m) {
  m.impl("cpu_tiers", TORCH_BOX(&bkd::cpu_tiers));
}
