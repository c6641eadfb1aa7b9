"""Means over the cells of a grid in Triton: a program has a cell of a block of channels."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from bkd_fast.ops.grid_means import Arguments
from bkd_fast.ops.grid_means.gpu import images_and_means
from bkd_fast.ops.triton_common import Tuned, config, operator, strides


@triton.jit
def grid_means_kernel(
    x, means, channels, height, width, grid, image_stride, channel_stride, pixel_stride, BLOCK: tl.constexpr
):
    """The sum of a cell's pixels, one after the other, divided by their number."""
    blocks = tl.cdiv(channels, BLOCK)
    cell = tl.program_id(0) // blocks
    channel = (tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    within = channel < channels
    image = (cell // (grid * grid)).to(tl.int64)
    cell = cell % (grid * grid)
    y = (cell // grid).to(tl.int64)
    x_of_cell = (cell % grid).to(tl.int64)
    top = y * height // grid
    bottom = ((y + 1) * height + grid - 1) // grid
    left = x_of_cell * width // grid
    right = ((x_of_cell + 1) * width + grid - 1) // grid
    columns = right - left
    count = (bottom - top) * columns
    start = x + image * image_stride + channel * channel_stride
    total = tl.zeros((BLOCK,), tl.float32)
    for step in range(0, count):
        pixel = (top + step // columns) * width + left + step % columns
        total += tl.load(start + pixel * pixel_stride, mask=within, other=0.0)
    to = means + (image * channels + channel) * (grid * grid) + cell
    tl.store(to, total / count.to(tl.float32), mask=within)


MEANS = Tuned(
    grid_means_kernel,
    {"any": (config(1, BLOCK=64), config(4, BLOCK=128), config(4, BLOCK=256))},
    key=("channels", "grid"),
)


@operator
def grid_means(a: Arguments) -> Tensor:
    """See :func:`bkd_fast.ops.grid_means`."""
    x, means = images_and_means(a)
    images, channels, height, width = x.shape
    if images:
        wrap_triton(MEANS())[lambda meta: (images * a.grid * a.grid * triton.cdiv(channels, meta["BLOCK"]),)](
            x, means, channels, height, width, a.grid, *strides(x)
        )
    return means
