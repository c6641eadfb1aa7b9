"""Teacher levels as the branches compare them: each by itself, or side by side."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from bkd_fast.ops.join_levels import join_levels


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
    factors = [(total / (len(levels) * level.shape[1])) ** 0.5 for level in levels]
    joint = join_levels(levels, factors, tuple(size))
    return [joint] if levels[0].shape[-2:] == size else [levels[0], joint]
