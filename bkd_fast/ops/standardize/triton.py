"""Averaged and standardised features in Triton: a program has a block of the result."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from bkd_fast.ops.registration import memory_format
from bkd_fast.ops.standardize import Arguments
from bkd_fast.ops.triton_common import Tuned, config, operator, strides


@triton.jit
def standardize_kernel(
    x, mean, std, output, count, channels, height, width, image_stride, channel_stride, pixel_stride, border,
    PATCH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK numbers of a channels_last result. ``border``: the exponent of the share inside."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    within = index < count
    pixel = index // channels
    channel = (index - pixel * channels).to(tl.int32)
    row = pixel // width
    column = (pixel - row * width).to(tl.int32)
    image = row // height
    y = (row - image * height).to(tl.int32)
    start = image * image_stride + channel.to(tl.int64) * channel_stride
    total = tl.zeros((BLOCK,), tl.float32)
    for step in range(0, PATCH * PATCH):
        own_y = y + step // PATCH - PATCH // 2
        own_x = column + step % PATCH - PATCH // 2
        inside = within & (own_y >= 0) & (own_y < height) & (own_x >= 0) & (own_x < width)
        at = start + (own_y * width + own_x).to(tl.int64) * pixel_stride
        total += tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    rows = tl.minimum(y + PATCH // 2, height - 1) - tl.maximum(y - PATCH // 2, 0) + 1
    columns = tl.minimum(column + PATCH // 2, width - 1) - tl.maximum(column - PATCH // 2, 0) + 1
    inside_count = (rows * columns).to(tl.float32)
    # 1 where all are inside, whatever the exponent; all of it with the exponent 0, none with 1
    share = tl.exp2(border * tl.log2(inside_count / (PATCH * PATCH)))
    average = tl.where(border == 1.0, total / (PATCH * PATCH), total / inside_count * share)
    shift = tl.load(mean + channel, mask=within, other=0.0)
    scale = tl.load(std + channel, mask=within, other=1.0)
    tl.store(output + index, (average - shift) / scale, mask=within)


STANDARDIZE = Tuned(standardize_kernel, {"any": (config(4, BLOCK=512), config(4, BLOCK=1024))}, key=("PATCH",))


@operator
def standardize(a: Arguments) -> Tensor:
    """See :func:`bkd_fast.ops.standardize`."""
    x = a.x.contiguous(memory_format=memory_format(a.x))
    output = torch.empty(x.shape, dtype=torch.float32, device=x.device, memory_format=torch.channels_last)
    count = x.numel()
    if count:
        wrap_triton(STANDARDIZE())[lambda meta: (triton.cdiv(count, meta["BLOCK"]),)](
            x, a.mean.float().contiguous(), a.std.float().contiguous(), output, count, *x.shape[1:], *strides(x),
            a.border, PATCH=a.patch_size,
        )  # fmt: skip
    return output
