#include <algorithm>

#include "dispatch.h"

namespace bkd {
namespace {

// The moves of a window, in the order in which equal distances are preferred.
std::vector<Move> moves_of(int64_t radius) {
  std::vector<Move> moves;
  for (int64_t y = -radius; y <= radius; ++y)
    for (int64_t x = -radius; x <= radius; ++x) moves.push_back({y, x});
  std::stable_sort(moves.begin(), moves.end(),
                   [](const Move& a, const Move& b) { return a.y * a.y + a.x * a.x < b.y * b.y + b.x * b.x; });
  return moves;
}

Numbers numbers_of(const Tensor& tensor) {
  using torch::headeronly::ScalarType;
  if (tensor.scalar_type() == ScalarType::Half) return Numbers::Half;
  if (tensor.scalar_type() == ScalarType::BFloat16) return Numbers::BFloat;
  return Numbers::Same;
}

// Images are channels-last.
void local_match(int64_t tier, const Tensor& query, const Tensor& support, const Tensor& shots, int64_t radius,
                 const Tensor& distance, const Tensor& displacement) {
  const std::vector<Move> moves = moves_of(radius);
  dispatch(query, [&](auto zero) {
    using T = decltype(zero);
    LocalMatch<T> p{};
    p.parallel = run_parallel;
    p.threads = torch::stable::get_num_threads();
    p.batch = query.size(0), p.channels = query.size(1), p.height = query.size(2), p.width = query.size(3);
    p.shots = shots.size(1), p.radius = radius, p.moves = moves.data();
    p.query = data<T>(query);
    p.support = data<char>(support), p.numbers = numbers_of(support), p.bytes = support.element_size();
    p.shot = data<int64_t>(shots);
    p.distance = data<T>(distance), p.displacement = data<T>(displacement);
    kernels_of<T>(tier).local_match(p);
  });
}

}  // namespace
}  // namespace bkd

STABLE_TORCH_LIBRARY_FRAGMENT(bkd_fast_native, m) {
  m.def(
      "local_match(int tier, Tensor query, Tensor support, Tensor shots, int radius, Tensor(a!) distance, "
      "Tensor(b!) displacement) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(bkd_fast_native, CPU, m) { m.impl("local_match", TORCH_BOX(&bkd::local_match)); }
