// Operator template: checks and registration.
#include "scaled_copy.h"

#include "bindings.h"

namespace bkd {
namespace {

void copy(const Tensor& input, double scale, const Tensor& output) {
  const Checks check("scaled_copy", "input", input, KERNEL_TYPES);
  check.tensor("input", input, sizes_of(input), Layout::either);
  check.tensor("output", output, sizes_of(input), layout_of(input));
  check.aligned("input", input), check.aligned("output", output);
  const Current current(input);
  scaled_copy({input.numel(), static_cast<float>(scale), data(input), data(output)}, type_of(input), current.device);
}

}  // namespace
}  // namespace bkd

BKD_DEFINITIONS(m) { m.def("scaled_copy(Tensor input, float scale, Tensor(a!) output) -> ()"); }

BKD_KERNELS(m) { m.impl("scaled_copy", TORCH_BOX(&bkd::copy)); }
