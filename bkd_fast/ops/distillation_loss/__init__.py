"""The loss between the levels of a teacher and a student."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from bkd_fast.ops.checks import check_levels, check_types, named_levels
from bkd_fast.ops.registration import Result, register, wide

__all__ = ["distillation_loss"]

DIRECTIONS = ("flat", "pixel")


class Arguments(NamedTuple):
    """The operator's arguments, as its schema and every backend have them."""

    teacher: list[Tensor]
    student: list[Tensor]
    direction: str
    value_weight: float


def distillation_loss(
    teacher: Sequence[Tensor], student: Sequence[Tensor], *, direction: str = "flat", value_weight: float = 0.5
) -> Tensor:
    """Compute direction and value loss, summed over the levels (BKD Eq. 11-12; Salehi et al., MKD).

    L_dir is the mean of 1 - cos, over images with all of a level flattened (``flat``) or over positions (``pixel``).
    L_val is the mean squared difference of all elements. The cosine is ``dot / max(|t| |s|, 1e-8)``. Sums are float32
    for half precision.

    Args:
        teacher: L levels (N, C_l, H_l, W_l).
        student: L levels of the same shapes.
        direction: ``flat`` or ``pixel``.
        value_weight: the factor of L_val.

    Returns:
        A scalar, float32, or float64 for float64 levels; 0 for an empty batch.

    Raises:
        TypeError, ValueError: the message names the argument, what was given and what was expected.
        RuntimeError: forward-mode or second derivatives.
    """
    check_types(_NAME, named_levels(teacher, student))
    return _operator(list(teacher), list(student), direction, float(value_weight))[0]


def _check(a: Arguments) -> None:
    check_levels(_NAME, a.teacher, a.student)
    if len(a.student) != len(a.teacher):
        raise ValueError(f"{_NAME}: student has {len(a.student)} levels, expected {len(a.teacher)}, as many as teacher")
    if a.direction not in DIRECTIONS:
        raise ValueError(f"{_NAME}: direction is {a.direction!r}, expected one of {DIRECTIONS}")
    if not a.value_weight >= 0:
        raise ValueError(f"{_NAME}: value_weight is {a.value_weight}, expected a number from 0")


def _results(a: Arguments) -> list[Result]:
    """The loss, and the statistics that its gradient needs (described by the reference)."""
    dtype = wide(a.teacher[0])
    if a.direction == "flat":
        count = sum(level.shape[0] for level in a.teacher)
    else:
        count = sum(level.shape[0] * level.shape[2] * level.shape[3] for level in a.teacher)
    return [Result((), dtype), Result((3 * count,), dtype)]


_NAME = "distillation_loss"
_operator = register(_NAME, Arguments, check=_check, results=_results, outputs=2)
