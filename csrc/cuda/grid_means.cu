// Means over the cells of a grid. A thread has a cell of a channel; adjacent threads have adjacent channels where these
// are adjacent in memory, and adjacent cells where rows are.
#include "grid_means.h"

#include "device.cuh"

namespace bkd {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) grid_means_kernel(const GridMeans p) {
  const int64_t number = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int cells = p.grid * p.grid;
  const int64_t each = int64_t{p.channels} * cells;
  if (number >= p.images * each) return;
  const int64_t image = number / each;
  const int own = static_cast<int>(number - image * each);
  const int channel = p.channels_last ? own % p.channels : own / cells;
  const int cell = p.channels_last ? own / p.channels : own % cells;
  const int y = cell / p.grid, x = cell % p.grid;
  // Cells overlap where the grid does not divide the size: from the pixel that a cell begins in to the one it ends in.
  const int top = static_cast<int>(int64_t{y} * p.height / p.grid),
            left = static_cast<int>(int64_t{x} * p.width / p.grid);
  const int bottom = static_cast<int>((int64_t{y + 1} * p.height + p.grid - 1) / p.grid);
  const int right = static_cast<int>((int64_t{x + 1} * p.width + p.grid - 1) / p.grid);
  const int64_t plane = int64_t{p.height} * p.width, step = p.channels_last ? p.channels : 1;
  const float* from = p.x + image * p.channels * plane + (p.channels_last ? channel : channel * plane);
  float sum = 0;
  for (int row = top; row < bottom; ++row) {
    for (int column = left; column < right; ++column) {
      sum += load<float>(from + (int64_t{row} * p.width + column) * step);
    }
  }
  store(p.output + image * each + int64_t{channel} * cells + cell,
        sum / static_cast<float>((bottom - top) * (right - left)));
}

}  // namespace

void grid_means(const GridMeans& p, const Device& device) {
  launch("grid_means", &grid_means_kernel, blocks_for(p.images * p.channels * p.grid * p.grid, kThreads), 1, 1,
         kThreads, 0, device, p);
}

}  // namespace bkd
