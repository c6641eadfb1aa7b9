"""The loss between a teacher's levels and what a branch makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bkd_fast.ops.checks import check_levels
from bkd_fast.ops.registration import empty_like, refuse_double_backward, register

DIRECTIONS = ("flat", "pixel")


def distillation_loss(
    teacher: Sequence[Tensor], student: Sequence[Tensor], *, direction: str = "flat", value_weight: float = 0.5
) -> Tensor:
    """Direction and value loss, summed over the levels (BKD Eq. 11-12; Salehi et al., MKD).

    L_dir is the mean of 1 - cos, over images with all of a level flattened (``flat``) or over positions
    (``pixel``); L_val the mean
    squared difference of all elements. The cosine is ``dot / max(|t| |s|, 1e-8)``. Sums are float32 for half precision.

    Args:
        teacher: L levels (N, C_l, H_l, W_l).
        student: L levels of the same shapes.
        direction: ``flat`` or ``pixel``.
        value_weight: of L_val beside L_dir.

    Returns:
        A scalar, float32, or float64 for float64 levels; 0 for an empty batch.

    Raises:
        TypeError, ValueError: the message names the argument, what it was and what it should be.
    """
    name = "distillation_loss"
    check_levels(name, teacher, student)
    if len(student) != len(teacher):
        raise ValueError(f"{name}: student has {len(student)} levels, expected {len(teacher)}, as many as teacher")
    if direction not in DIRECTIONS:
        raise ValueError(f"{name}: direction is {direction!r}, expected one of {DIRECTIONS}")
    if not value_weight >= 0:
        raise ValueError(f"{name}: value_weight is {value_weight}, expected a number from 0")
    return _loss(list(teacher), list(student), direction, float(value_weight))[0]


def _fake(teacher: Any, student: Any, direction: Any, value_weight: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if teacher[0].dtype == torch.float64 else torch.float32
    if direction == "flat":
        count = sum(level.shape[0] for level in teacher)
    else:
        count = sum(level.shape[0] * level.shape[2] * level.shape[3] for level in teacher)
    return teacher[0].new_empty((), dtype=dtype), teacher[0].new_empty(3 * count, dtype=dtype)


def _backward_fake(grad: Any, teacher: Any, student: Any, statistics: Any, *settings: Any) -> list[Tensor]:
    return [empty_like(level, need) for level, need in zip([*teacher, *student], settings[-1], strict=True)]


SCHEMA = "(Tensor[] teacher, Tensor[] student, str direction, float value_weight) -> (Tensor, Tensor)"
BACKWARD_SCHEMA = (
    "(Tensor grad, Tensor[] teacher, Tensor[] student, Tensor statistics, str direction, float value_weight, "
    "bool[] needs) -> Tensor[]"
)
_loss = register("distillation_loss", SCHEMA, _fake)
_loss_backward = register("distillation_loss_backward", BACKWARD_SCHEMA, _backward_fake)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    teacher, student, *ctx.settings = inputs
    ctx.levels = len(teacher)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*teacher, *student, output[1])


def _autograd(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    *saved, statistics = ctx.saved_tensors
    needs = [tensor.requires_grad for tensor in saved]
    found = _loss_backward(grad, saved[: ctx.levels], saved[ctx.levels :], statistics, *ctx.settings, needs)
    gradients = [value if need else None for value, need in zip(found, needs, strict=True)]
    return gradients[: ctx.levels], gradients[ctx.levels :], None, None


_loss.register_autograd(_autograd, setup_context=_setup)
refuse_double_backward(_loss_backward, "distillation_loss")
