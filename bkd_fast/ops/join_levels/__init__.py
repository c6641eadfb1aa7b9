"""Feature levels side by side at one size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bkd_fast.ops.checks import check_index, check_shape, check_tensors, check_types, named, pair
from bkd_fast.ops.registration import Result, no_gradient, register, wide

__all__ = ["join_levels"]


class Arguments(NamedTuple):
    """The operator's arguments, as its schema and every backend have them."""

    levels: list[Tensor]
    factors: list[float]
    size: list[int]


def join_levels(levels: Sequence[Tensor], factors: Sequence[float], size: int | Sequence[int]) -> Tensor:
    """Return all levels at one size, each times its factor, side by side in one tensor.

    A level that is higher is averaged over blocks of ``round(own / size)`` pixels along each axis, at the far border
    over what is left of a block. What then has another size is interpolated bilinearly (``align_corners=False``).
    Arithmetic is float32 for half precision. There is no gradient.

    Args:
        levels: L tensors (N, C_l, H_l, W_l).
        factors: L numbers.
        size: (H, W), or one number for both.

    Returns:
        (N, C_1 + … + C_L, H, W), channels_last, float32, or float64 for float64 levels.

    Raises:
        TypeError, ValueError: the message names the argument, what was given and what was expected.
        RuntimeError: in backward.
    """
    check_types(_NAME, named("levels", levels))
    return _operator(list(levels), [float(factor) for factor in factors], pair(_NAME, "size", size, 1))


def ratios(level: Tensor, size: Sequence[int]) -> list[int] | None:
    """Return height and width of the blocks that a level is averaged over; None for a level that is not."""
    if level.shape[2] <= size[0]:
        return None
    return [max(1, round(own / other)) for own, other in zip(level.shape[2:], size, strict=True)]


def _check(a: Arguments) -> None:
    if not a.levels:
        raise ValueError(f"{_NAME}: levels is empty, expected at least one level")
    check_tensors(_NAME, named("levels", a.levels))
    for name, level in named("levels", a.levels).items():
        check_shape(_NAME, name, level, (a.levels[0].shape[0], "C", "H", "W"))
        if 0 in level.shape[1:]:
            raise ValueError(f"{_NAME}: {name} has shape {tuple(level.shape)}, expected no size 0 but the batch")
        check_index(_NAME, name, level.shape[1:])
    if len(a.factors) != len(a.levels):
        raise ValueError(f"{_NAME}: factors has {len(a.factors)} numbers, expected {len(a.levels)}, one for each level")
    check_index(_NAME, "the result", [sum(level.shape[1] for level in a.levels), *pair(_NAME, "size", a.size, 1)])


def _results(a: Arguments) -> list[Result]:
    first = a.levels[0]
    channels = sum(level.shape[1] for level in a.levels)
    return [Result((first.shape[0], channels, *a.size), wide(first), torch.channels_last)]


_NAME = "join_levels"
_operator = register(
    _NAME, Arguments, check=_check, results=_results,
    gradient=no_gradient(_NAME),
)  # fmt: skip
