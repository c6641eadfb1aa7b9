"""Levels side by side in Triton: a launch for each level."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from bkd_fast.ops.join_levels import Arguments
from bkd_fast.ops.join_levels.gpu import sources
from bkd_fast.ops.triton_common import Tuned, config, operator


@triton.jit
def join_levels_kernel(
    level, output, count, channels, height, width, first, total, out_height, out_width,
    block_y, block_x, scale_y, scale_x, factor, AVERAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One level, channels_last, into its channels of the result, from ``first`` of ``total`` on.

    AVERAGE: over blocks of block_y by block_x pixels; otherwise interpolated, scale_y and scale_x between pixels.
    """
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    within = index < count
    pixel = index // channels
    channel = index - pixel * channels
    row = pixel // out_width
    x = (pixel - row * out_width).to(tl.int32)
    image = row // out_height
    y = (row - image * out_height).to(tl.int32)
    start = image * height * width * channels + channel
    if AVERAGE:
        sum = tl.zeros((BLOCK,), tl.float32)
        for step in range(0, block_y * block_x):
            own_y = y * block_y + step // block_x
            own_x = x * block_x + step % block_x
            inside = within & (own_y < height) & (own_x < width)
            sum += tl.load(level + start + (own_y * width + own_x).to(tl.int64) * channels, mask=inside, other=0.0)
        rows = tl.minimum(block_y, height - y * block_y)
        columns = tl.minimum(block_x, width - x * block_x)
        value = sum / (rows * columns).to(tl.float32)
    else:
        above = tl.maximum((y + 0.5) * scale_y - 0.5, 0.0)
        left = tl.maximum((x + 0.5) * scale_x - 0.5, 0.0)
        top, beside = tl.minimum(above.to(tl.int32), height - 1), tl.minimum(left.to(tl.int32), width - 1)
        down, right = above - top, left - beside
        lower, next_to = tl.minimum(top + 1, height - 1), tl.minimum(beside + 1, width - 1)
        a = tl.load(level + start + (top * width + beside).to(tl.int64) * channels, mask=within, other=0.0)
        b = tl.load(level + start + (top * width + next_to).to(tl.int64) * channels, mask=within, other=0.0)
        c = tl.load(level + start + (lower * width + beside).to(tl.int64) * channels, mask=within, other=0.0)
        d = tl.load(level + start + (lower * width + next_to).to(tl.int64) * channels, mask=within, other=0.0)
        value = (1 - down) * ((1 - right) * a + right * b) + down * ((1 - right) * c + right * d)
    tl.store(output + pixel * total + first + channel, factor * value, mask=within)


JOIN = Tuned(join_levels_kernel, {"any": (config(4, BLOCK=512), config(4, BLOCK=1024))}, key=("AVERAGE",))


@operator
def join_levels(a: Arguments) -> Tensor:
    """See :func:`bkd_fast.ops.join_levels`."""
    levels, blocks, output = sources(a)
    first, pixels = 0, output.shape[0] * a.size[0] * a.size[1]
    for level, own, factor in zip(levels, blocks, a.factors, strict=True):
        channels, height, width = level.shape[1:]
        count = pixels * channels
        if count:
            wrap_triton(JOIN())[lambda meta, count=count: (triton.cdiv(count, meta["BLOCK"]),)](
                level, output, count, channels, height, width, first, output.shape[1], *a.size, *own,
                height / a.size[0], width / a.size[1], factor, AVERAGE=own != [0, 0],
            )  # fmt: skip
        first += channels
    return output
