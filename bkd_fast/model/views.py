"""Teacher levels as the branches compare them: each by itself, or side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def joint_views(levels: Sequence[Tensor]) -> list[Tensor]:
    """Return the level at stride 4 by itself, and all three side by side at stride 8.

    The finest level is averaged, the deepest interpolated. Each counts the same in a squared distance: it is divided by
    the square root of its share of the channels.

    Args:
        levels: standardised, (N, C_l, H_l, W_l) at strides 4, 8 and 16.

    Returns:
        (N, C_1, H_1, W_1) and (N, C_1 + C_2 + C_3, H_2, W_2).
    """
    fine, middle, deep = levels
    averaged = F.avg_pool2d(fine, 2, ceil_mode=True, count_include_pad=False)
    enlarged = F.interpolate(deep, size=middle.shape[-2:], mode="bilinear", align_corners=False)
    total = sum(level.shape[1] for level in levels)
    parts = [part * (total / (len(levels) * part.shape[1])) ** 0.5 for part in (averaged, middle, enlarged)]
    return [fine, torch.cat(parts, 1).contiguous(memory_format=torch.channels_last)]
