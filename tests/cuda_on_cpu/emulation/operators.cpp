// What the tests ask of the emulation itself.
#include <torch/csrc/stable/library.h>

#include <string>

#include "cuda_on_cpu.h"

namespace emulated {
namespace {

// forward, reversed, eager, or a seed for a random order
void choose_order(std::string order, int64_t seed) {
  set_order(order == "forward"    ? Order::kForward
            : order == "reversed" ? Order::kReversed
            : order == "eager"    ? Order::kEager
                                  : Order::kRandom,
            static_cast<uint64_t>(seed));
}
void count_traffic(bool on) { traffic::count(on); }
std::string traffic_report() { return traffic::report(); }
void choose_device(int64_t processors, int64_t shared, bool is_dry) {
  multiprocessors = static_cast<int>(processors);
  shared_bytes = static_cast<int>(shared);
  dry = is_dry;
}
// Forgets the launches so far.
void choose_wgmma(bool on) {
  wgmma = on;
  launched.clear();
}
// A line each: kernel, threads, bytes of dynamic shared memory, blocks.
std::string launches() {
  std::string text;
  for (const auto& [name, last] : launched) {
    text += name + ' ' + std::to_string(last.threads) + ' ' + std::to_string(last.shared) + ' ' +
            std::to_string(last.blocks) + '\n';
  }
  return text;
}

}  // namespace
}  // namespace emulated

STABLE_TORCH_LIBRARY(cuda_on_cpu, m) {
  m.def("order(str order, int seed) -> ()");
  m.def("count_traffic(bool on) -> ()");
  m.def("traffic() -> str");
  m.def("device(int multiprocessors, int shared, bool dry) -> ()");
  m.def("wgmma(bool on) -> ()");
  m.def("launches() -> str");
}
STABLE_TORCH_LIBRARY_IMPL(cuda_on_cpu, CompositeExplicitAutograd, m) {
  m.impl("order", TORCH_BOX(&emulated::choose_order));
  m.impl("count_traffic", TORCH_BOX(&emulated::count_traffic));
  m.impl("traffic", TORCH_BOX(&emulated::traffic_report));
  m.impl("device", TORCH_BOX(&emulated::choose_device));
  m.impl("wgmma", TORCH_BOX(&emulated::choose_wgmma));
  m.impl("launches", TORCH_BOX(&emulated::launches));
}
