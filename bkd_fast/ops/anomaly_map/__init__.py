"""The anomaly map of several levels and branches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from bkd_fast.ops.checks import check_index, check_levels, check_types, named_levels, pair
from bkd_fast.ops.registration import Result, register, wide

__all__ = ["cosine_anomaly_map"]

FUSIONS = ("product", "sum")
MAX_SIGMA = 2**16  # pixels


class Arguments(NamedTuple):
    """The operator's arguments, as its schema and every backend have them."""

    teacher: list[Tensor]
    student: list[Tensor]
    size: list[int]
    fusion: str
    sigma: float
    weights: list[float]
    exponents: list[float]
    align_corners: bool
    value_share: float


def cosine_anomaly_map(
    teacher: Sequence[Tensor],
    student: Sequence[Tensor],
    size: int | Sequence[int],
    *,
    fusion: str = "product",
    sigma: float = 4.0,
    weights: Sequence[float] | None = None,
    exponents: Sequence[float] | None = None,
    align_corners: bool = False,
    value_share: float = 0.0,
) -> Tensor:
    """Compute the distance of students to their teacher at each pixel, over all levels and branches (BKD Eq. 13).

    At each position of a level d = (1 - value_share) (1 - cos(t, s)) + value_share mean((t - s)^2) over the channels.
    The distances of the branches are added with their weights, raised to the level's exponent, upsampled bilinearly,
    fused over the levels, and smoothed by a Gaussian. The cosine is ``dot / max(|t| |s|, 1e-8)``. Arithmetic is float32
    for half precision, in which a product of small distances is zero.

    Args:
        teacher: L levels (N, C_l, H_l, W_l), of any sizes.
        student: B L tensors of the teacher's shapes, all levels of one branch after those of another.
        size: (H, W) of the map in pixels, or one number for both.
        fusion: ``product`` (Eq. 13) or ``sum`` over the levels.
        sigma: std of the smoothing in pixels of the map, 0 (none) to 65536. Borders are mirrored (scipy's
            ``reflect``), the radius is 4 sigma.
        weights: B L factors, ordered as ``student``; None = ones.
        exponents: L positive numbers; None = ones. Distances below 1e-6 count as 1e-6 where it is not one.
        align_corners: of the upsampling.
        value_share: 0 to 1; 0 = the cosine alone.

    Returns:
        (N, H, W), float32, or float64 for float64 levels.

    Raises:
        TypeError, ValueError: the message names the argument, what was given and what was expected.
        RuntimeError: forward-mode or second derivatives.
    """
    check_types(_NAME, named_levels(teacher, student))
    factors = [1.0] * len(student) if weights is None else [float(weight) for weight in weights]
    powers = [1.0] * len(teacher) if exponents is None else [float(exponent) for exponent in exponents]
    return _operator(
        list(teacher), list(student), pair(_NAME, "size", size, 1), fusion, float(sigma), factors, powers,
        align_corners, float(value_share),
    )  # fmt: skip


def _check(a: Arguments) -> None:
    check_levels(_NAME, a.teacher, a.student)
    check_index(_NAME, "size", pair(_NAME, "size", a.size, 1))
    if a.fusion not in FUSIONS:
        raise ValueError(f"{_NAME}: fusion is {a.fusion!r}, expected one of {FUSIONS}")
    if not 0 <= a.sigma <= MAX_SIGMA:
        raise ValueError(f"{_NAME}: sigma is {a.sigma}, expected a number of pixels from 0 to {MAX_SIGMA}")
    if not 0 <= a.value_share <= 1:
        raise ValueError(f"{_NAME}: value_share is {a.value_share}, expected 0 to 1")
    if len(a.weights) != len(a.student):
        raise ValueError(
            f"{_NAME}: weights has {len(a.weights)} numbers, expected {len(a.student)}, one for each student level"
        )
    if len(a.exponents) != len(a.teacher) or not all(0 < power < float("inf") for power in a.exponents):
        raise ValueError(
            f"{_NAME}: exponents is {a.exponents}, expected {len(a.teacher)} positive numbers, one for each level"
        )


def _results(a: Arguments) -> list[Result]:
    dtype = wide(a.teacher[0])
    return [Result((a.teacher[0].shape[0], *a.size), dtype)]


_NAME = "cosine_anomaly_map"
_operator = register(_NAME, Arguments, check=_check, results=_results)
