"""The means of images over the cells of a grid."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from bkd_fast.ops.checks import check_index, check_shape, check_tensors, check_types
from bkd_fast.ops.registration import Result, no_gradient, register, wide

__all__ = ["grid_means"]

MAX_GRID = 1024


class Arguments(NamedTuple):
    """The operator's arguments, as its schema and every backend have them."""

    x: Tensor
    grid: int


def grid_means(x: Tensor, grid: int) -> Tensor:
    """Return the means of each image over the cells of a grid, as a row: ``adaptive_avg_pool2d(x, grid).flatten(1)``.

    A cell goes from the pixel that it begins in to the one that it ends in: where the grid does not divide the size,
    cells overlap. Arithmetic is float32 for half precision. There is no gradient.

    Args:
        x: (N, C, H, W).
        grid: cells along each side, 1 to 1024.

    Returns:
        (N, C * grid * grid), channel after channel, the cells of each row-major; float32, or float64 for float64
        images.

    Raises:
        TypeError, ValueError: the message names the argument, what was given and what was expected.
        RuntimeError: in backward.
    """
    check_types(_NAME, {"x": x})
    if not isinstance(grid, int) or isinstance(grid, bool):
        raise ValueError(f"{_NAME}: grid is {grid!r}, expected an integer from 1 to {MAX_GRID}")
    return _operator(x, grid)


def _check(a: Arguments) -> None:
    check_tensors(_NAME, {"x": a.x})
    check_shape(_NAME, "x", a.x, ("N", "C", "H", "W"))
    if 0 in a.x.shape[1:]:
        raise ValueError(f"{_NAME}: x has shape {tuple(a.x.shape)}, expected no size 0 but the batch")
    if not 1 <= a.grid <= MAX_GRID:
        raise ValueError(f"{_NAME}: grid is {a.grid!r}, expected an integer from 1 to {MAX_GRID}")
    check_index(_NAME, "x", a.x.shape[2:])
    check_index(_NAME, "the result", [a.x.shape[1], a.grid, a.grid])


def _results(a: Arguments) -> list[Result]:
    return [Result((a.x.shape[0], a.x.shape[1] * a.grid * a.grid), wide(a.x))]


_NAME = "grid_means"
_operator = register(_NAME, Arguments, check=_check, results=_results, gradient=no_gradient(_NAME))
