// Local matching. Several lanes share a pixel of a query and a support image.
#include "local_match.h"

#include "matching.cuh"

namespace bkd {
namespace {

constexpr int kThreads = 256;

// lanes_per_pixel: a power of 2.
template <class T>
__global__ void __launch_bounds__(kThreads, 4) local_match_kernel(const LocalMatch p, int lanes_per_pixel) {
  const int lane = threadIdx.x % lanes_per_pixel;
  const int64_t result = int64_t{blockIdx.x} * (kThreads / lanes_per_pixel) + threadIdx.x / lanes_per_pixel;
  const bool active = result < p.results();
  const int64_t pair = active ? result / p.pixels() : 0, pixel = active ? result - pair * p.pixels() : 0;
  const int y = static_cast<int>(pixel / p.width), x = static_cast<int>(pixel - int64_t{y} * p.width);
  const int64_t shot = load<int64_t>(p.shot + pair);
  const bool known = active && shot >= 0 && shot < p.images;
  const float* own = p.query + (pair / p.shots * p.pixels() + pixel) * p.channels;
  const int64_t start = (known ? shot : 0) * p.pixels() + pixel;  // support pixel at offset 0
  const Nearest best = search<T>(p, own, start, known, y, x, lane, lanes_per_pixel);
  if (!active || lane != 0) return;
  float* displacement = p.displacement + 2 * pair * p.pixels() + pixel;
  store(p.distance + result, best.rank < 0 ? nanf("") : best.sum / static_cast<float>(p.unpadded_channels));
  store(displacement, best.rank < 0 ? 0.0f : static_cast<float>(vertical(best.rank)));
  store(displacement + p.pixels(), best.rank < 0 ? 0.0f : static_cast<float>(horizontal(best.rank)));
}

template <class T>
void start(const LocalMatch& p, const Device& device) {
  const int lanes_per_pixel = lanes_for<T>(p.channels);
  launch("local_match", &local_match_kernel<T>, blocks_for(p.results(), kThreads / lanes_per_pixel), 1, 1, kThreads, 0,
         device, p, lanes_per_pixel);
}

}  // namespace

void local_match(const LocalMatch& p, Type type, const Device& device) {
  dispatch(type, [&](auto zero) { start<decltype(zero)>(p, device); });
}

}  // namespace bkd
