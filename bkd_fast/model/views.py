"""Teacher levels as the branches compare them: each by itself, or side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def middle(count: int) -> int:
    """Return which of ``count`` levels has the size at which all are compared side by side."""
    return (count - 1) // 2


def joint_views(levels: Sequence[Tensor]) -> list[Tensor]:
    """Return all levels side by side at the size of the middle one, and before them the finest one where it is finer.

    Finer levels are averaged, coarser ones interpolated. Each counts the same in a squared distance: it is divided by
    the square root of its share of the channels.

    Args:
        levels: standardised, (N, C_l, H_l, W_l) from fine to coarse, of any number and any sizes.

    Returns:
        (N, C_1, H_1, W_1), unless level 1 has the size of the middle one, and (N, C_1 + … + C_L, H_m, W_m).
    """
    size = levels[middle(len(levels))].shape[-2:]
    total = sum(level.shape[1] for level in levels)
    parts = [_resized(level, size) * (total / (len(levels) * level.shape[1])) ** 0.5 for level in levels]
    joint = torch.cat(parts, 1).contiguous(memory_format=torch.channels_last)
    return [joint] if levels[0].shape[-2:] == size else [levels[0], joint]


def _resized(level: Tensor, size: torch.Size) -> Tensor:
    if level.shape[-2] > size[0]:
        ratio = [round(own / other) for own, other in zip(level.shape[-2:], size, strict=True)]
        level = F.avg_pool2d(level, ratio, ceil_mode=True, count_include_pad=False)
    if level.shape[-2:] == size:
        return level
    return F.interpolate(level, size=size, mode="bilinear", align_corners=False)
