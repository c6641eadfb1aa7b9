// The kernel of the template operator, compiled once for each instruction set.
#include "scaled_copy.h"

#include "simd.h"
#include "work.h"

namespace bkd {
namespace {

template <class T>
void scaled_copy(const ScaledCopy<T>& p) {
  constexpr int64_t CHUNK = 16384;  // elements of a task
  constexpr int W = LANES<T>;
  in_parallel(p.parallel, parts(p.count, CHUNK), [&](TaskQueue& queue) {
    for (int64_t task; (task = queue.next()) >= 0;) {
      int64_t i = task * CHUNK;
      const int64_t end = least(i + CHUNK, p.count);
      for (; i + W <= end; i += W) store(p.output + i, p.scale * load(p.input + i));
      if (i < end) store_part(p.output + i, p.scale * load_part(p.input + i, end - i), end - i);
    }
  });
}

}  // namespace

BKD_DEFINE_KERNEL(scaled_copy, ScaledCopy)

}  // namespace bkd
