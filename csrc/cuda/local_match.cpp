// Local matching.
#include "local_match.h"

#include "bindings.h"

namespace bkd {
namespace {

// channels: without padding to 16-byte chunks.
void match(const Tensor& query, const Tensor& support, const Tensor& shots, int64_t channels, int64_t radius,
           const Tensor& distance, const Tensor& displacement) {
  const Checks check("local_match", "query", query, {ScalarType::Float});
  check.tensor("query", query, {ANY, ANY, ANY, ANY}, Layout::channels_last);
  check.not_empty("query", query, 1), check.aligned("query", query);
  const Checks own("local_match", "support", support, KERNEL_TYPES);
  const int64_t batch = query.size(0), height = query.size(2), width = query.size(3);
  check.tensor("support", support, own.type(), {ANY, query.size(1), height, width}, Layout::channels_last);
  check.aligned("support", support), check.chunks("support", support, query.size(1));
  check.tensor("shots", shots, ScalarType::Long, {batch, ANY});
  check.in_range("channels", channels, 1, query.size(1)), check.in_range("radius", radius, 0, kMaxRadius);
  check.in_range("the number of pixels", height * width, 1, MAX_INT);
  check.tensor("distance", distance, {batch, shots.size(1), height, width});
  check.tensor("displacement", displacement, {batch, shots.size(1), 2, height, width});
  const Current current(query);
  LocalMatch p{};
  p.queries = static_cast<int>(query.size(0)), p.images = static_cast<int>(support.size(0));
  p.shots = static_cast<int>(shots.size(1)), p.channels = static_cast<int>(query.size(1));
  p.unpadded_channels = static_cast<int>(channels), p.radius = static_cast<int>(radius);
  p.height = static_cast<int>(query.size(2)), p.width = static_cast<int>(query.size(3));
  p.query = data<float>(query), p.support = data(support), p.shot = data<int64_t>(shots);
  p.distance = data<float>(distance), p.displacement = data<float>(displacement);
  local_match(p, type_of(support), current.device);
}

}  // namespace
}  // namespace bkd

BKD_DEFINITIONS(m) {
  m.def(
      "local_match(Tensor query, Tensor support, Tensor shots, int channels, int radius, Tensor(a!) distance, "
      "Tensor(b!) displacement) -> ()");
}

BKD_KERNELS(m) { m.impl("local_match", TORCH_BOX(&bkd::match)); }
