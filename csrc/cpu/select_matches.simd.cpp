// The pixels that match best, found for a row of pixels side by side.
#include "select_matches.h"

#include "simd.h"
#include "work.h"

namespace bkd {
namespace {

// Sort a shot into the first `filled` of a list, the nearest in front; return what falls out at its end in `distance`
// and `number`. NaN is behind every number, and of equal distances the first one stays in front. Numbers of shots are
// kept as T, which is exact.
template <class T>
BKD_INLINE void insert(Vec<T>* nearest, Vec<T>* shot, int64_t filled, Vec<T>& distance, Vec<T>& number) {
  auto moved = distance != distance;
  moved ^= moved;  // no lane yet; from its place on, a lane's list moves on by one
  for (int64_t i = 0; i < filled; ++i) {
    moved |= (distance < nearest[i]) | ((nearest[i] != nearest[i]) & (distance == distance));
    const Vec<T> next = moved ? nearest[i] : distance, next_number = moved ? shot[i] : number;
    nearest[i] = moved ? distance : nearest[i], shot[i] = moved ? number : shot[i];
    distance = next, number = next_number;
  }
}

template <class T>
void select_matches(const SelectMatches<T>& p) {
  constexpr int W = LANES<T>;
  const int64_t plane = p.height * p.width;
  in_parallel(p.parallel, p.batch * p.height, [&](TaskQueue& queue) {
    Vec<T> nearest[MAX_MATCHES], shot[MAX_MATCHES];
    for (int64_t task; (task = queue.next()) >= 0;) {
      const int64_t n = task / p.height, y = task % p.height;
      for (int64_t x = 0; x < p.width; x += W) {
        const int64_t lanes = min(W, p.width - x), pixel = y * p.width + x;
        for (int64_t s = 0; s < p.shots; ++s) {
          const T* from = p.distance + (n * p.shots + s) * plane + pixel;
          Vec<T> distance = lanes < W ? load_part(from, lanes) : load(from), number = all(T(s));
          insert<T>(nearest, shot, min(s, p.count), distance, number);
          if (s < p.count) nearest[s] = distance, shot[s] = number;
        }
        for (int64_t lane = 0; lane < lanes; ++lane)
          for (int64_t i = 0; i < p.count; ++i) {
            const int64_t s = n * p.shots + int64_t(shot[i][lane]);
            const T* moved = p.displacement + 2 * s * plane + pixel + lane;
            p.position[((n * p.height + y) * p.width + x + lane) * p.count + i] =
                (p.shot[s] * p.height + y + int64_t(moved[0])) * p.width + x + lane + int64_t(moved[plane]);
          }
      }
    }
  });
}

}  // namespace

BKD_DEFINE_KERNEL(select_matches, SelectMatches)

}  // namespace bkd
