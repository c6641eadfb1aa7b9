// Matching and combination of supports: checks, and registration at the end.
#include "match_supports.h"

#include <algorithm>

#include "bindings.h"
#include "local_match.h"
#include "neighbor_regression.h"

namespace bkd {
namespace {

// channels: of each view without padding to 16-byte chunks.
void match(const Tensors& queries, const Tensors& supports, const Tensor& shots, const Integers& channels,
           int64_t radius, int64_t neighbors, double ridge, const Tensors& outputs) {
  const Checks check("match_supports", "shots", shots, {ScalarType::Long});
  check.tensor("shots", shots, {ANY, ANY});
  const int64_t batch = shots.size(0), count = shots.size(1);
  check.in_range("the number of views", static_cast<int64_t>(queries.size()), 1, kMaxMatchedViews);
  check.length("supports", supports.size(), queries.size()), check.length("channels", channels.size(), queries.size());
  check.length("outputs", outputs.size(), queries.size());
  check.in_range("the number of shots", count, 1, kMaxMatchedShots), check.in_range("radius", radius, 0, kMaxRadius);
  check.in_range("neighbors", neighbors, 1, std::min<int64_t>(count, kFewNeighbors));
  check.in_range("ridge", ridge, 1e-6, 1e6);
  const Checks own("match_supports", "supports[0]", supports[0], KERNEL_TYPES);
  MatchSupports p{};
  for (size_t i = 0; i < queries.size(); ++i) {
    const auto name = [&](const char* list) { return std::string(list) + "[" + std::to_string(i) + "]"; };
    const Tensor &query = queries[i], &support = supports[i], &output = outputs[i];
    check.tensor(name("queries"), query, ScalarType::Float, {batch, ANY, ANY, ANY}, Layout::channels_last);
    check.not_empty(name("queries"), query, 1), check.aligned(name("queries"), query);
    const int64_t height = query.size(2), width = query.size(3);
    check.tensor(name("supports"), support, own.type(), {supports[0].size(0), query.size(1), height, width},
                 Layout::channels_last);
    check.aligned(name("supports"), support), check.chunks(name("supports"), support, query.size(1));
    check.tensor(name("outputs"), output, ScalarType::Float, {batch, query.size(1), height, width},
                 Layout::channels_last);
    check.aligned(name("outputs"), output);
    check.in_range("channels", channels[i], 1, query.size(1));
    check.in_range("the number of pixels", height * width, 1, MAX_INT);
    MatchSupports::View& view = p.view[p.views++];
    view.channels = static_cast<int>(query.size(1)), view.unpadded_channels = static_cast<int>(channels[i]);
    view.height = static_cast<int>(height), view.width = static_cast<int>(width);
    view.radius = static_cast<int>(radius);
    view.query = data<float>(query), view.support = data(support), view.output = data<float>(output);
  }
  const Current current(shots);
  p.queries = static_cast<int>(batch), p.images = static_cast<int>(supports[0].size(0));
  p.shots = static_cast<int>(count), p.neighbors = static_cast<int>(neighbors);
  p.ridge = static_cast<float>(ridge), p.shot = data<int64_t>(shots);
  match_supports(p, type_of(supports[0]), current.device);
}

}  // namespace
}  // namespace bkd

BKD_DEFINITIONS(m) {
  m.def(
      "match_supports(Tensor[] queries, Tensor[] supports, Tensor shots, int[] channels, int radius, int neighbors, "
      "float ridge, Tensor(a!)[] outputs) -> ()");
}

BKD_KERNELS(m) { m.impl("match_supports", TORCH_BOX(&bkd::match)); }
