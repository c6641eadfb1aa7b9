// Matching in a window.
#include "local_match.h"

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
  if (tensor.scalar_type() == ScalarType::Half) return Numbers::Half;
  if (tensor.scalar_type() == ScalarType::BFloat16) return Numbers::BFloat;
  return Numbers::Same;
}

// Images are channels-last.
void check_arguments(const Tensor& query, const Tensor& support, const Tensor& shots, int64_t radius,
                     const Tensor& distance, const Tensor& displacement) {
  const Checks check("local_match", "query", query, KERNEL_TYPES);
  check.tensor("query", query, {ANY, ANY, ANY, ANY}, Layout::channels_last);
  check.not_empty("query", query, 1);
  const bool half = numbers_of(support) != Numbers::Same && check.type() == ScalarType::Float;
  check.tensor("support", support, half ? support.scalar_type() : check.type(),
               {ANY, query.size(1), query.size(2), query.size(3)}, Layout::channels_last);
  check.tensor("shots", shots, ScalarType::Long, {query.size(0), ANY});
  const int64_t *shot = data<int64_t>(shots), images = support.size(0);
  for (int64_t i = 0; i < shots.numel(); ++i)
    check.that(shot[i] >= 0 && shot[i] < images, "shots", "has " + std::to_string(shot[i]),
               "0 to " + std::to_string(images - 1) + ", the images of support");
  check.in_range("radius", radius, 0, MAX_MATCH_RADIUS);
  const int64_t batch = query.size(0), shot_count = shots.size(1), height = query.size(2), width = query.size(3);
  check.tensor("distance", distance, {batch, shot_count, height, width});
  check.tensor("displacement", displacement, {batch, shot_count, 2, height, width});
}

void local_match(int64_t tier, const Tensor& query, const Tensor& support, const Tensor& shots, int64_t radius,
                 const Tensor& distance, const Tensor& displacement) {
  check_arguments(query, support, shots, radius, distance, displacement);
  const std::vector<Move> moves = moves_of(radius);
  dispatch(query, [&](auto zero) {
    using T = decltype(zero);
    LocalMatch<T> p{};
    p.threads = torch::stable::get_num_threads();
    p.batch = query.size(0), p.channels = query.size(1), p.height = query.size(2), p.width = query.size(3);
    p.shots = shots.size(1), p.radius = radius, p.moves = moves.data();
    p.query = data<T>(query);
    p.support = data<char>(support), p.numbers = numbers_of(support), p.bytes = support.element_size();
    p.shot = data<int64_t>(shots);
    p.distance = data<T>(distance), p.displacement = data<T>(displacement);
    Kernel<LocalMatch<T>> kernel = local_match_kernel<T>;
#if defined(__x86_64__)
    // Summing up across 64 bytes costs more than they save: measured on Zen 4, from 24 to 448 channels.
    if (sizeof(T) == sizeof(float)) kernel.avx512 = kernel.avx2;
#endif
    run(kernel, tier, p);
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
