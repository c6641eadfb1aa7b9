"""Faults that the tests must catch: barriers, bounds, fragments, waits, indices, and arithmetic."""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    """A text that occurs once in a file of csrc/cuda, its replacement, and the tests that may catch it."""

    name: str
    file: str
    text: str
    instead: str
    tests: str


CONV, GATHER, ATTENTION = "reference and conv", "reference and gather", "reference and attention"
ANOMALY, LOSS = "reference and anomaly", "reference and loss"
MATCH = "matching or no_image"

FAULTS = (
    # the template
    Fault(
        "scaled copy: the last elements are left out",
        "scaled_copy.cu",
        "for (int64_t i = first; i < p.count; ++i)",
        "for (int64_t i = first; i < p.count - 1; ++i)",
        "template",
    ),
    Fault(
        "scaled copy: a chunk too many",
        "scaled_copy.cu",
        "first + kCount <= p.count",
        "first < p.count",
        "template",
    ),
    # bias, shortcut and activation
    Fault(
        "bias: a channel's last number gets the next channel's",
        "bias_activation.cu",
        "if (++within == run) within = 0,",
        "if (++within + 1 == run) within = 0,",
        "bias_activation",
    ),
    Fault(
        "activation: NaN becomes the least value",
        "bias_activation.cu",
        "value = value < p.low ? p.low : value;",
        "value = value >= p.low ? value : p.low;",
        "bias_activation",
    ),
    Fault(
        "bias: rows of a slice are adjacent",
        "bias_activation.cu",
        "int64_t{row - image * height} * p.row_stride",
        "int64_t{row - image * height} * p.row",
        "bias_activation",
    ),
    # tiles and instructions
    Fault(
        "fragment of a: rows 8 to 15 before the deeper half",
        "tile.cuh",
        "const int next_index = kIsA ? middle : high, next_depth = kIsA ? high : middle;",
        "const int next_index = kIsA ? high : high, next_depth = kIsA ? middle : middle;",
        "tiles",
    ),
    Fault(
        "fragment of b: columns before depth",
        "tile.cuh",
        "next_depth = kIsA ? high : middle;",
        "next_depth = kIsA ? high : high;",
        "tiles",
    ),
    Fault(
        "swizzle differs between rows",
        "tile.cuh",
        "chunk ^ (row >> 1 & 3)",
        "chunk ^ (row >> 1 & 7)",
        "tiles or conv",
    ),
    Fault(
        "second step of the depth is left out",
        "tile.cuh",
        "for (int step = 0; step < kSteps; ++step) multiply_step",
        "for (int step = 0; step < kSteps - 1; ++step) multiply_step",
        "tiles",
    ),
    Fault(
        "columns of c are exchanged",
        "tile.cuh",
        "value[i][j][below * 2], value[i][j][below * 2 + 1]",
        "value[i][j][below * 2 + 1], value[i][j][below * 2]",
        "tiles",
    ),
    # modulated deformable convolution
    Fault(
        "conv: no barrier before a tile is multiplied",
        "deform_conv.cu",
        "    wait_for_copies<0>();\n    __syncthreads();\n    if (more(next))",
        "    wait_for_copies<0>();\n    if (more(next))",
        CONV,
    ),
    Fault("conv: no wait for the weights", "deform_conv.cu", "    wait_for_copies<0>();\n", "", CONV),
    Fault(
        "conv: bound of the outputs off by one",
        "deform_conv.cu",
        "const bool valid = output < p.group_outputs() && channel < d.last;",
        "const bool valid = output < p.group_outputs() - 1 && channel < d.last;",
        CONV,
    ),
    Fault(
        "conv: bound of the channels off by one",
        "deform_conv.cu",
        "if (d.channel < d.last) return false;",
        "if (d.channel <= d.last) return false;",
        CONV,
    ),
    Fault("conv: neighbours of the wrong tap", "deform_conv.cu", "d.table ^= 1;", "", CONV),
    Fault(
        "conv: last pixel is left out",
        "deform_conv.cu",
        "if (pixel >= p.pixels ||",
        "if (pixel >= p.pixels - 1 ||",
        CONV,
    ),
    Fault(
        "conv: bias of the first group for all",
        "deform_conv.cu",
        "if (bias) first += wide(load<T>(bias + channel));",
        "if (bias) first += wide(load<T>(bias + within));",
        CONV,
    ),
    Fault(
        "sampling: x before y",
        "sampling.cuh",
        "const int64_t channel = 2 * (group * s.taps + tap);",
        "const int64_t channel = 2 * (group * s.taps + tap) ^ 1;",
        CONV,
    ),
    Fault(
        "sampling: mask of another offset group",
        "sampling.cuh",
        "const int64_t channel = group * s.taps + tap;",
        "const int64_t channel = tap;",
        CONV,
    ),
    Fault(
        "sampling: dilation is exchanged with stride",
        "sampling.cuh",
        "down * s.dilation_y",
        "down * s.stride_y",
        "reference and (conv or dilation)",
    ),
    Fault(
        "sampling: images start one pixel late",
        "sampling.cuh",
        "const int image = index / s.pixels(), pixel = index - image * s.pixels();",
        "const int image = (index + 1) / s.pixels(), pixel = index - index / s.pixels() * s.pixels();",
        CONV,
    ),
    Fault(
        "sampling: the border is read for outside pixels",
        "sampling.cuh",
        "return pixel < 0 ? kOutside : base + pixel;",
        "return base + (pixel < 0 ? 0 : pixel);",
        "outside_is_zero or beyond_the_image",
    ),
    Fault(
        "sampling: outside pixels are read",
        "sampling.cuh",
        "if (index[i] != kOutside) value[i] = load<Pack<T>>(input + int64_t{index[i]} * channels + channel);",
        "value[i] = load<Pack<T>>(input + int64_t{index[i] == kOutside ? 0 : index[i]} * channels + channel);",
        "outside_is_zero",
    ),
    Fault(
        "backward: gradients of outside pixels go to the first pixel",
        "scatter.cuh",
        "    if (sample.pixel[i] == kOutside) continue;  // uniform across the warp\n"
        "    const int64_t at = int64_t{sample.pixel[i]} * line + channel;",
        "    const int64_t at = int64_t{sample.pixel[i] == kOutside ? 0 : sample.pixel[i]} * line + channel;",
        "outside_is_zero or beyond_the_image",
    ),
    Fault(
        "backward: no barrier before columns are read",
        "deform_conv_backward.cu",
        "    });\n    __syncthreads();\n#pragma unroll\n    for (int i = 0; i < kPixelsPerWarp; ++i) {",
        "    });\n#pragma unroll\n    for (int i = 0; i < kPixelsPerWarp; ++i) {",
        CONV,
    ),
    Fault(
        "backward: columns are read as if not shifted",
        "deform_conv_backward.cu",
        "shared.columns[row][lane ^ (row % 8 * 4)]",
        "shared.columns[row][lane]",
        CONV,
    ),
    Fault(
        "backward: mask is left out",
        "scatter.cuh",
        "const float weight = sample.weight[i] * sample.mask;",
        "const float weight = sample.weight[i];",
        CONV,
    ),
    Fault("backward: offset's gradient without the mask", "scatter.cuh", "grad_y * sample.mask);", "grad_y);", CONV),
    Fault(
        "backward: second channel is added to the first",
        "scatter.cuh",
        "add(grad_input, scale, at + 1, weight * grad.y);",
        "add(grad_input, scale, at, weight * grad.y);",
        CONV,
    ),
    Fault(
        "weights: last pixels are left out",
        "deform_conv_weight.cu",
        "const int steps = (p.pixels + kDepth<T> - 1) / kDepth<T>;",
        "const int steps = p.pixels / kDepth<T>;",
        CONV,
    ),
    Fault(
        "weights: neighbours are overwritten too early",
        "deform_conv_weight.cu",
        "if (step + 2 < end) compute(step + 2);",
        "if (step + 2 < end) compute(step + 3 < end ? step + 3 : step + 2);",
        CONV,
    ),
    Fault(
        "weights: parts overlap",
        "deform_conv_weight.cu",
        "const int end = static_cast<int>(int64_t{steps} * (part + 1) / p.parts);",
        "const int end = min(steps, static_cast<int>(int64_t{steps} * (part + 1) / p.parts) + 1);",
        CONV,
    ),
    Fault(
        "gather: taps beyond the ninth read the first ones",
        "deform_gather.cu",
        "(first + slot) * p.channels + channel",
        "slot * p.channels + channel",
        GATHER,
    ),
    Fault(
        "gather: one group of taps",
        "deform_gather.cu",
        "const int group = (first + slot) / s.taps, tap = first + slot - group * s.taps;",
        "const int group = 0, tap = first + slot;",
        GATHER,
    ),
    Fault(
        "gather: no barrier before the next taps", "deform_gather.cu", "    if (first) __syncthreads();\n", "", GATHER
    ),
    Fault(
        "gather: gradient of a shared image by batch",
        "scatter.cuh",
        "const uint32_t base = shared_input ? 0 : out.image",
        "const uint32_t base = out.image",
        GATHER,
    ),
    # memory attention
    Fault(
        "attention: the max logit is not subtracted",
        "memory_attention.cu",
        "expf(logit - largest)",
        "expf(logit - 0 * largest)",
        "small_temperature",
    ),
    Fault(
        "attention: each lane's own sum of exponentials",
        "memory_attention.cu",
        "  sum = sum_lanes(sum);\n",
        "",
        ATTENTION,
    ),
    Fault(
        "attention: a list in the order of lanes",
        "memory_attention.cu",
        "kept & ((1u << lane) - 1)",
        "kept & ((1u << lane) - 1) & 0xffff",
        ATTENTION,
    ),
    Fault(
        "attention: a list is one too long",
        "memory_attention.cu",
        "if (count > p.max_kept) for_each",
        "if (count > p.max_kept + 1) for_each",
        ATTENTION,
    ),
    Fault(
        "attention: total of one lane",
        "memory_attention.cu",
        "  total = sum_lanes(total);\n  const float scale",
        "  const float scale",
        ATTENTION,
    ),
    Fault(
        "attention: no more than a warp of a list is read",
        "memory_attention.cu",
        "for (int first = 0; first < count; first += kWarpSize) {\n    Kept own",
        "for (int first = 0; first < min(count, 32); first += kWarpSize) {\n    Kept own",
        ATTENTION,
    ),
    Fault(
        "attention: dense rows overwrite the others",
        "memory_attention.cu",
        "if (channel >= p.channels || !dense(first_row + row)) return;",
        "if (channel >= p.channels || first_row + row >= p.rows) return;",
        ATTENTION,
    ),
    Fault(
        "attention: no barrier before weights are written again",
        "memory_attention.cu",
        "    __syncthreads();\n    if (step + 1 < steps) copy(step + 1);",
        "    if (step + 1 < steps) copy(step + 1);\n    __syncthreads();",
        ATTENTION,
    ),
    Fault(
        "attention: sums are not rescaled to the new max",
        "memory_attention.cu",
        "(sum == 0 ? 0 : sum * expf(largest - both))",
        "sum",
        ATTENTION,
    ),
    Fault(
        "attention: gradient without the softmax's own",
        "memory_attention.cu",
        "(grad_weight(item, own) - inner)",
        "(grad_weight(item, own))",
        ATTENTION,
    ),
    # levels
    Fault(
        "levels: one thread of a pixel is left out",
        "pairs.cuh",
        "for (int i = 0; i < kThreadsPerPixel; ++i) total",
        "for (int i = 0; i < kThreadsPerPixel - 1; ++i) total",
        f"{ANOMALY} or {LOSS}",
    ),
    Fault(
        "levels: no barrier before sums are read",
        "pairs.cuh",
        "      store_shared(&partial[slice][own], x);\n      __syncthreads();\n",
        "      store_shared(&partial[slice][own], x);\n",
        f"{ANOMALY} or {LOSS}",
    ),
    Fault(
        "levels: teacher's gradient of the last branch only",
        "pairs.cu",
        "grad_teacher[i] += slope",
        "grad_teacher[i] = slope",
        ANOMALY,
    ),
    Fault("anomaly: borders are not mirrored", "anomaly_map.cu", "2 * length - 1 - within", "length - 1", ANOMALY),
    Fault(
        "anomaly: the sum of some branches is raised",
        "anomaly_map.cu",
        "if (p.raise && level.exponent != 1)",
        "if (level.exponent != 1)",
        ANOMALY,
    ),
    Fault("anomaly: a level reads the first one", "anomaly_map.cu", "p.level[blockIdx.y];", "p.level[0];", ANOMALY),
    Fault(
        "anomaly: NaN becomes the smallest distance",
        "anomaly_map.cu",
        "total < kMinDistance ? kMinDistance : total",
        "total >= kMinDistance ? total : kMinDistance",
        "raised",
    ),
    Fault("anomaly: half a pixel off", "interpolation.cuh", "* ratio - 0.5f, 0)", "* ratio, 0)", ANOMALY),
    Fault(
        "anomaly: no barrier before neighbours are read",
        "anomaly_map.cu",
        "    __syncthreads();\n    if (x < p.width) {",
        "    if (x < p.width) {",
        ANOMALY,
    ),
    Fault(
        "loss: last elements of an image are left out",
        "distillation_loss.cu",
        "end = chunks * (blockIdx.x + 1) / p.splits;",
        "end = chunks / p.splits * (blockIdx.x + 1);",
        LOSS,
    ),
    Fault(
        "loss: a warp is left out",
        "distillation_loss.cu",
        "for (int i = 0; i < kThreads / kWarpSize; ++i) total",
        "for (int i = 1; i < kThreads / kWarpSize; ++i) total",
        LOSS,
    ),
    # averaged, standardised and joined features
    Fault(
        "standardize: a row too few",
        "standardize.cu",
        "bottom = min(y + radius, p.height - 1);",
        "bottom = min(y + radius, p.height - 1) - (radius > 0);",
        "standardize",
    ),
    Fault(
        "standardize: zeros count wherever the border is",
        "standardize.cu",
        "p.border == 0 ? 1 / inside",
        "p.border == 0 ? 1 / whole",
        "standardize",
    ),
    Fault(
        "standardize: channels first are read as channels last",
        "standardize.cu",
        "p.channels_first ? channel * plane : channel",
        "channel",
        "standardize",
    ),
    Fault(
        "join: blocks beyond the border",
        "join_levels.cu",
        "right = min(left + level.block_width, level.width);",
        "right = left + level.block_width;",
        "join",
    ),
    Fault(
        "join: a level begins at the first channel", "join_levels.cu", " + level.first + channel", " + channel", "join"
    ),
    # the nearest rows
    Fault(
        "nearest rows: of equal ones the last in front",
        "nearest_rows.cu",
        "score[e] >= value));",
        "score[e] > value));",
        "nearest",
    ),
    Fault(
        "nearest rows: the first of a second warp's worth is lost",
        "nearest_rows.cu",
        "const bool carried = e > 0 && lane == 0;",
        "const bool carried = false;",
        "nearest",
    ),
    Fault(
        "nearest rows: the last scores are left out",
        "nearest_rows.cu",
        "first < p.rows; first += kAhead",
        "first + kAhead * kWarpSize <= p.rows; first += kAhead",
        "nearest",
    ),
    # matching
    Fault("match: the longer offset of equal distances", "local_match.cu", "other < rank", "other > rank", MATCH),
    Fault(
        "match: offsets beyond the right border",
        "local_match.cu",
        "&& x + dx + offset < p.width;",
        "&& x + dx + offset <= p.width;",
        MATCH,
    ),
    Fault("match: offsets beyond the window", "local_match.cu", "row && dx + offset <= p.radius &&", "row &&", MATCH),
    Fault("match: NaN beats a number", "local_match.cu", "sums[offset] == sums[offset] && ", "", MATCH),
    Fault(
        "match: a shot that is no image",
        "local_match.cu",
        "const bool known = active && shot >= 0 && shot < p.images;",
        "const bool known = active;",
        MATCH,
    ),
    Fault(
        "match: a lane is left out",
        "local_match.cu",
        "step = lanes_per_pixel / 2; step > 0;",
        "step = lanes_per_pixel / 2; step > 1;",
        MATCH,
    ),
    Fault(
        "match: padded channels count",
        "local_match.cu",
        "best / static_cast<float>(p.unpadded_channels)",
        "best / static_cast<float>(p.channels)",
        MATCH,
    ),
    # neighbour regression and selection
    Fault(
        "regression: rows outside the bank are read",
        "neighbor_regression.cu",
        "return index >= 0 && index < p.bank_rows ? index * p.channels : -1;",
        "return index % p.bank_rows * p.channels;",
        "rows_that_do_not_exist",
    ),
    Fault(
        "regression: no barrier before elimination",
        "neighbor_regression.cu",
        "if (thread == 0) system.pivot_row[count] = system.right[step];\n    __syncthreads();",
        "if (thread == 0) system.pivot_row[count] = system.right[step];",
        "regression",
    ),
    Fault(
        "regression: weights are not normalized",
        "neighbor_regression.cu",
        "for (int i = 0; i < kFew; ++i) weight[i] /= sum;",
        "for (int i = 0; i < kFew; ++i) weight[i] /= 1;",
        "regression",
    ),
    Fault("selection: the last of equal shots", "select_matches.cu", "first < second;", "first > second;", "selection"),
    Fault("selection: NaN is the nearest", "select_matches.cu", "return nan_b;", "return nan_a;", "selection"),
)
