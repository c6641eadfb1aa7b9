"""A constant channel beside the features, so that a cosine also sees how large they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def lifted(levels: Sequence[Tensor], lift: float) -> list[Tensor]:
    """Levels (N, C, H, W) with one more channel, whose square is ``lift`` * C; as they are where ``lift`` is 0.

    The direction of a standardised feature near zero is noise. With the constant c beside them,
    1 - cos([q, c], [s, c]) is a squared distance, |q - s|^2 / 2 c^2, as long as features are short, and 1 - cos(q, s)
    where they are long.
    """
    if not lift:
        return list(levels)
    return [torch.cat([level, torch.full_like(level[:, :1], (lift * level.shape[1]) ** 0.5)], 1) for level in levels]
