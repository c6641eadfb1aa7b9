// Levels side by side: checks, and registration at the end.
#include "join_levels.h"

#include "bindings.h"

namespace bkd {
namespace {

// blocks: height and width of each level's blocks, both 0 for a level that is interpolated.
void join(const Tensors& levels, const std::vector<double>& factors, const Integers& blocks, const Tensor& output) {
  const Checks check("join_levels", "output", output, {ScalarType::Float});
  check.tensor("output", output, {ANY, ANY, ANY, ANY}, Layout::channels_last);
  check.aligned("output", output);
  check.length("factors", factors.size(), levels.size()), check.length("blocks", blocks.size(), 2 * levels.size());
  const int64_t height = output.size(2), width = output.size(3);
  check.in_range("the size of an image", output.size(1) * height * width, 0, MAX_INT);
  int64_t channels = 0;
  for (size_t i = 0; i < levels.size(); ++i) {
    const std::string name = "levels[" + std::to_string(i) + "]";
    const Tensor& level = levels[i];
    check.tensor(name, level, {output.size(0), ANY, ANY, ANY}, Layout::channels_last);
    check.not_empty(name, level, 1), check.aligned(name, level);
    check.in_range("the size of " + name, level.size(1) * level.size(2) * level.size(3), 1, MAX_INT);
    const int64_t block_height = blocks[2 * i], block_width = blocks[2 * i + 1];
    check.in_range("blocks", block_height, 0, MAX_INT), check.in_range("blocks", block_width, 0, MAX_INT);
    const bool interpolated = block_height == 0 && block_width == 0;
    // Every block has a pixel.
    check.that(interpolated || (block_height && block_width && (height - 1) * block_height < level.size(2) &&
                                (width - 1) * block_width < level.size(3)),
               "blocks", "is " + to_text(blocks), "blocks that begin within " + name);
    channels += level.size(1);
  }
  check.that(channels == output.size(1), "output", "has " + std::to_string(output.size(1)) + " channels",
             std::to_string(channels) + ", those of all levels");
  const Current current(output);
  int first = 0;
  for (size_t start = 0; start < levels.size(); start += kMaxJoined) {
    JoinLevels p{};
    for (size_t i = start; i < levels.size() && p.levels < kMaxJoined; ++i) {
      const Tensor& x = levels[i];
      JoinLevels::Level& own = p.level[p.levels++];
      own.x = data<float>(x), own.channels = static_cast<int>(x.size(1));
      own.height = static_cast<int>(x.size(2)), own.width = static_cast<int>(x.size(3)), own.first = first;
      own.block_height = static_cast<int>(blocks[2 * i]), own.block_width = static_cast<int>(blocks[2 * i + 1]);
      own.factor = static_cast<float>(factors[i]);
      first += own.channels;
    }
    p.images = output.size(0), p.height = static_cast<int>(height), p.width = static_cast<int>(width);
    p.channels = static_cast<int>(output.size(1)), p.output = data<float>(output);
    join_levels(p, current.device);
  }
}

}  // namespace
}  // namespace bkd

BKD_DEFINITIONS(m) { m.def("join_levels(Tensor[] levels, float[] factors, int[] blocks, Tensor(a!) output) -> ()"); }

BKD_KERNELS(m) { m.impl("join_levels", TORCH_BOX(&bkd::join)); }
