"""The anomaly map of several levels and branches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bkd_fast.ops.checks import check_levels, pair
from bkd_fast.ops.registration import empty_like, refuse_double_backward, register

FUSIONS = ("product", "sum")


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
    """How far students are from their teacher at each pixel, over all levels and branches (BKD Eq. 13).

    At each position of a level d = (1 - value_share) (1 - cos(t, s)) + value_share mean((t - s)^2) over the
    channels; the branches'
    distances are added with their weights, raised to the level's exponent, upsampled bilinearly, fused over the levels,
    and smoothed by a Gaussian. The cosine is ``dot / max(|t| |s|, 1e-8)``. Arithmetic is float32 for half precision, in
    which a product of small distances is zero.

    Args:
        teacher: L levels (N, C_l, H_l, W_l), of any sizes.
        student: B L tensors of the teacher's shapes, all levels of one branch after those of another.
        size: (H, W) of the map in pixels, or one number for both.
        fusion: ``product`` (Eq. 13) or ``sum`` over the levels.
        sigma: of the smoothing, in pixels of the map; 0 = none. Borders are mirrored (scipy's ``reflect``), radius
            4 sigma.
        weights: B L factors, ordered as ``student``; None = ones.
        exponents: L positive numbers; None = ones. Distances are taken as 1e-6 at least where it is not one.
        align_corners: of the upsampling.
        value_share: 0 to 1; 0 = the cosine alone.

    Returns:
        (N, H, W), float32, or float64 for float64 levels.

    Raises:
        TypeError, ValueError: the message names the argument, what it was and what it should be.
    """
    name = "cosine_anomaly_map"
    check_levels(name, teacher, student)
    target = pair(name, "size", size, 1)
    if fusion not in FUSIONS:
        raise ValueError(f"{name}: fusion is {fusion!r}, expected one of {FUSIONS}")
    if not sigma >= 0:
        raise ValueError(f"{name}: sigma is {sigma}, expected a number of pixels from 0")
    if not 0 <= value_share <= 1:
        raise ValueError(f"{name}: value_share is {value_share}, expected 0 to 1")
    factors = [1.0] * len(student) if weights is None else [float(weight) for weight in weights]
    if len(factors) != len(student):
        raise ValueError(
            f"{name}: weights has {len(factors)} numbers, expected {len(student)}, one for each student level"
        )
    powers = [1.0] * len(teacher) if exponents is None else [float(exponent) for exponent in exponents]
    if len(powers) != len(teacher) or not all(0 < power < float("inf") for power in powers):
        raise ValueError(f"{name}: exponents is {powers}, expected {len(teacher)} positive numbers, one for each level")
    return _map(
        list(teacher), list(student), target, fusion, float(sigma), factors, powers, align_corners, float(value_share)
    )


def _fake(teacher: Any, student: Any, size: Any, *_: Any) -> Tensor:
    dtype = torch.float64 if teacher[0].dtype == torch.float64 else torch.float32
    return teacher[0].new_empty((teacher[0].shape[0], *size), dtype=dtype)


def _backward_fake(grad: Any, teacher: Any, student: Any, *settings: Any) -> list[Tensor]:
    return [empty_like(level, need) for level, need in zip([*teacher, *student], settings[-1], strict=True)]


_SETTINGS = (
    "int[] size, str fusion, float sigma, float[] weights, float[] exponents, bool align_corners, float value_share"
)
SCHEMA = f"(Tensor[] teacher, Tensor[] student, {_SETTINGS}) -> Tensor"
BACKWARD_SCHEMA = f"(Tensor grad, Tensor[] teacher, Tensor[] student, {_SETTINGS}, bool[] needs) -> Tensor[]"
_map = register("cosine_anomaly_map", SCHEMA, _fake)
_map_backward = register("cosine_anomaly_map_backward", BACKWARD_SCHEMA, _backward_fake)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    teacher, student, *ctx.settings = inputs
    ctx.levels = len(teacher)
    ctx.save_for_backward(*teacher, *student)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    saved = list(ctx.saved_tensors)
    needs = [tensor.requires_grad for tensor in saved]
    found = _map_backward(grad, saved[: ctx.levels], saved[ctx.levels :], *ctx.settings, needs)
    gradients = [value if need else None for value, need in zip(found, needs, strict=True)]
    return gradients[: ctx.levels], gradients[ctx.levels :], *(None for _ in ctx.settings)


_map.register_autograd(_autograd, setup_context=_setup)
refuse_double_backward(_map_backward, "cosine_anomaly_map")
