"""The positions of the pixels that match best, from what ``local_match`` returns."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bkd_fast.ops.checks import check_index, check_index_tensor, check_shape, check_tensors, check_types
from bkd_fast.ops.registration import Result, register

__all__ = ["select_matches"]

MAX_MATCHES = 64


class Arguments(NamedTuple):
    """The operator's arguments, as its schema and every backend have them."""

    distance: Tensor
    displacement: Tensor
    shots: Tensor
    matches: int


def select_matches(distance: Tensor, displacement: Tensor, shots: Tensor, matches: int) -> Tensor:
    """Return which support pixels match each query pixel best: those of the shots that come nearest.

    A position is the index of a pixel among all pixels of the support, ``(shot * H + y + dy) * W + x + dx``: the row
    of a channels-last support of shape (P * H * W, C). Of equal distances the first shot is taken; NaN loses to any
    number. There is no gradient.

    Args:
        distance, displacement: of :func:`bkd_fast.ops.local_match`, (N, k, H, W) and (N, k, 2, H, W).
        shots: (N, k) int64, as given to it.
        matches: how many of them, 1 to k, at most 64.

    Returns:
        (N, H, W, matches) int64, the nearest first.

    Raises:
        TypeError, ValueError: the message names the argument, what was given and what was expected.
        RuntimeError: in backward.
    """
    check_types(_NAME, {"distance": distance, "displacement": displacement, "shots": shots})
    if not isinstance(matches, int) or isinstance(matches, bool):
        raise ValueError(f"{_NAME}: matches is {matches!r}, expected an integer from 1 to {MAX_MATCHES}")
    return _operator(distance, displacement, shots, matches)


def _check(a: Arguments) -> None:
    check_tensors(_NAME, {"distance": a.distance, "displacement": a.displacement})
    check_shape(_NAME, "distance", a.distance, ("N", "k", "H", "W"))
    batch, shots, *size = a.distance.shape
    check_shape(_NAME, "displacement", a.displacement, (batch, shots, 2, *size))
    check_index_tensor(_NAME, "shots", a.shots, "distance", a.distance)
    check_shape(_NAME, "shots", a.shots, (batch, shots))
    if not 1 <= a.matches <= min(shots, MAX_MATCHES):
        raise ValueError(f"{_NAME}: matches is {a.matches!r}, expected an integer from 1 to {min(shots, MAX_MATCHES)}")
    check_index(_NAME, "distance", size)


def _results(a: Arguments) -> list[Result]:
    batch, _, *size = a.distance.shape
    return [Result((batch, *size, a.matches), torch.int64)]


_NAME = "select_matches"
_operator = register(
    _NAME, Arguments, check=_check, results=_results,
    gradient="select_matches has no gradient: its results are indices",
)  # fmt: skip
