"""What the GPU kernels are given: images in float32, contiguous or channels last, and a buffer for the result."""

from __future__ import annotations

import torch
from torch import Tensor

from bkd_fast.ops.grid_means import Arguments
from bkd_fast.ops.layout import floats


def images_and_means(a: Arguments) -> tuple[Tensor, Tensor]:
    """Return the images, copied only where they have another layout or type, and the buffer."""
    x = a.x.float()
    if not x.is_contiguous(memory_format=torch.channels_last):
        x = x.contiguous()
    return x, floats((x.shape[0], x.shape[1] * a.grid * a.grid), x)
