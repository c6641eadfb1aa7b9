// Selection of the best matches. One thread per pixel scans the distances once per match, for the nearest after the
// previous match. Reads are coalesced, and repeated ones hit L1.
#include "select_matches.h"

#include "device.cuh"

namespace bkd {
namespace {

constexpr int kThreads = 128;

// Strict order of distances: NaN last, ties by shot.
__device__ __forceinline__ bool before(float a, int first, float b, int second) {
  const bool nan_a = a != a, nan_b = b != b;
  if (nan_a != nan_b) return nan_b;
  if (!nan_a && a != b) return a < b;
  return first < second;
}

__global__ void __launch_bounds__(kThreads) select_matches_kernel(const SelectMatches p) {
  const int64_t result = int64_t{blockIdx.x} * kThreads + threadIdx.x, pixels = p.pixels();
  if (result >= p.queries * pixels) return;
  const int64_t query = result / pixels, pixel = result - query * pixels;
  const int y = static_cast<int>(pixel / p.width), x = static_cast<int>(pixel - int64_t{y} * p.width);
  const float* distance = p.distance + query * p.shots * pixels + pixel;
  float last = 0;
  int last_shot = -1;
  for (int match = 0; match < p.count; ++match) {
    float nearest = 0;
    int shot = -1;
    for (int s = 0; s < p.shots; ++s) {
      const float other = load<float>(distance + s * pixels);
      if (last_shot >= 0 && !before(last, last_shot, other, s)) continue;
      if (shot < 0 || before(other, s, nearest, shot)) nearest = other, shot = s;
    }
    last = nearest, last_shot = shot;
    const int64_t pair = query * p.shots + shot;
    const float* offset = p.displacement + 2 * pair * pixels + pixel;
    const int64_t row = y + static_cast<int64_t>(load<float>(offset));
    const int64_t column = x + static_cast<int64_t>(load<float>(offset + pixels));
    store(p.position + result * p.count + match, (load<int64_t>(p.shot + pair) * p.height + row) * p.width + column);
  }
}

}  // namespace

void select_matches(const SelectMatches& p, const Device& device) {
  launch("select_matches", &select_matches_kernel, blocks_for(p.queries * p.pixels(), kThreads), 1, 1, kThreads, 0,
         device, p);
}

}  // namespace bkd
