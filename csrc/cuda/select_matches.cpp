// Selection of the best matches.
#include "select_matches.h"

#include "bindings.h"

namespace bkd {
namespace {

void select(const Tensor& distance, const Tensor& displacement, const Tensor& shots, const Tensor& positions) {
  const Checks check("select_matches", "distance", distance, {ScalarType::Float});
  check.tensor("distance", distance, {ANY, ANY, ANY, ANY});
  const int64_t batch = distance.size(0), count = distance.size(1), height = distance.size(2), width = distance.size(3);
  check.in_range("the number of pixels", height * width, 0, MAX_INT);
  check.in_range("the number of shots", count, 0, MAX_INT);
  check.tensor("displacement", displacement, {batch, count, 2, height, width});
  check.tensor("shots", shots, ScalarType::Long, {batch, count});
  check.tensor("positions", positions, ScalarType::Long, {batch, height, width, ANY});
  check.in_range("the number of matches", positions.size(3), 1, count);
  const Current current(distance);
  SelectMatches p{};
  p.queries = batch, p.shots = static_cast<int>(count), p.count = static_cast<int>(positions.size(3));
  p.height = static_cast<int>(height), p.width = static_cast<int>(width);
  p.distance = data<float>(distance), p.displacement = data<float>(displacement), p.shot = data<int64_t>(shots);
  p.position = data<int64_t>(positions);
  select_matches(p, current.device);
}

}  // namespace
}  // namespace bkd

BKD_DEFINITIONS(m) {
  m.def("select_matches(Tensor distance, Tensor displacement, Tensor shots, Tensor(a!) positions) -> ()");
}

BKD_KERNELS(m) { m.impl("select_matches", TORCH_BOX(&bkd::select)); }
