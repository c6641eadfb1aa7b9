// The pixels that match best.
#include "select_matches.h"

#include "dispatch.h"

namespace bkd {
namespace {

void select_matches(int64_t tier, const Tensor& distance, const Tensor& displacement, const Tensor& shots,
                    const Tensor& positions) {
  const Checks check("select_matches", "distance", distance, KERNEL_TYPES);
  check.tensor("distance", distance, {ANY, ANY, ANY, ANY});
  const int64_t batch = distance.size(0), count = distance.size(1), height = distance.size(2), width = distance.size(3);
  check.tensor("displacement", displacement, {batch, count, 2, height, width});
  check.tensor("shots", shots, ScalarType::Long, {batch, count});
  check.tensor("positions", positions, ScalarType::Long, {batch, height, width, ANY});
  check.in_range("the number of matches", positions.size(3), 1, count < MAX_MATCHES ? count : MAX_MATCHES);
  dispatch(distance, [&](auto zero) {
    using T = decltype(zero);
    SelectMatches<T> p{};
    p.batch = batch, p.shots = count, p.height = height, p.width = width, p.count = positions.size(3);
    p.distance = data<T>(distance), p.displacement = data<T>(displacement), p.shot = data<int64_t>(shots);
    p.position = data<int64_t>(positions);
    run(select_matches_kernel<T>, tier, p);
  });
}

}  // namespace
}  // namespace bkd

STABLE_TORCH_LIBRARY_FRAGMENT(bkd_fast_native, m) {
  m.def("select_matches(int tier, Tensor distance, Tensor displacement, Tensor shots, Tensor(a!) positions) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(bkd_fast_native, CPU, m) { m.impl("select_matches", TORCH_BOX(&bkd::select_matches)); }
