// Means over the cells of a grid: checks, and registration at the end.
#include "grid_means.h"

#include "bindings.h"

namespace bkd {
namespace {

constexpr int64_t kMostCells = 1024;  // along a side

void means(const Tensor& x, int64_t grid, const Tensor& output) {
  const Checks check("grid_means", "x", x, {ScalarType::Float});
  check.tensor("x", x, {ANY, ANY, ANY, ANY}, Layout::either);
  check.not_empty("x", x, 1);
  check.in_range("grid", grid, 1, kMostCells);
  check.in_range("the number of pixels", x.size(2) * x.size(3), 1, MAX_INT);
  check.in_range("the number of means of an image", x.size(1) * grid * grid, 1, MAX_INT);
  check.tensor("output", output, {x.size(0), x.size(1) * grid * grid});
  const Current current(x);
  GridMeans p{};
  p.images = x.size(0), p.channels = static_cast<int>(x.size(1));
  p.height = static_cast<int>(x.size(2)), p.width = static_cast<int>(x.size(3)), p.grid = static_cast<int>(grid);
  p.channels_last = layout_of(x) == Layout::channels_last;
  p.x = data<float>(x), p.output = data<float>(output);
  grid_means(p, current.device);
}

}  // namespace
}  // namespace bkd

BKD_DEFINITIONS(m) { m.def("grid_means(Tensor x, int grid, Tensor(a!) output) -> ()"); }

BKD_KERNELS(m) { m.impl("grid_means", TORCH_BOX(&bkd::means)); }
