"""Levels side by side in plain PyTorch: the specification."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bkd_fast.ops.join_levels import Arguments, ratios
from bkd_fast.ops.registration import wide


def join_levels(a: Arguments) -> Tensor:
    """See :func:`bkd_fast.ops.join_levels`."""
    return joined(*a)


def joined(levels: Sequence[Tensor], factors: Sequence[float], size: Sequence[int]) -> Tensor:
    """Return the same; the arguments one by one."""
    dtype = wide(levels[0])
    parts = [_resized(level.to(dtype), size) * factor for level, factor in zip(levels, factors, strict=True)]
    return torch.cat(parts, 1)


def averaged(level: Tensor, size: Sequence[int]) -> Tensor:
    """Return a level averaged over its blocks, where it is higher than the result."""
    blocks = ratios(level, size)
    return level if blocks is None else F.avg_pool2d(level, blocks, ceil_mode=True, count_include_pad=False)


def _resized(level: Tensor, size: Sequence[int]) -> Tensor:
    level = averaged(level, size)
    if list(level.shape[2:]) == list(size):
        return level
    return F.interpolate(level, size=list(size), mode="bilinear", align_corners=False)
