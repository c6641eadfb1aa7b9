"""The distillation loss of Eq. 11-12 in plain PyTorch: the specification."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

EPSILON = 1e-8  # least product of norms in a cosine


def distillation_loss(
    teacher: Sequence[Tensor], student: Sequence[Tensor], direction: str, value_weight: float
) -> tuple[Tensor, Tensor]:
    """See :func:`bkd_fast.ops.distillation_loss`; also the flat statistics that the backward needs.

    Statistics: per level and, after "flat" or "pixel", per image or pixel: dot product, squared norm of teacher,
    of student.
    """
    dtype = _sum_dtype(teacher[0])
    total = torch.zeros((), dtype=dtype, device=teacher[0].device)
    statistics = []
    for t, s in zip(teacher, student, strict=True):
        wide_t, wide_s = t.to(dtype), s.to(dtype)
        dims = (1, 2, 3) if direction == "flat" else (1,)
        dot, tt, ss = (wide_t * wide_s).sum(dims), wide_t.square().sum(dims), wide_s.square().sum(dims)
        total = total + (1 - dot / (tt * ss).sqrt().clamp_min(EPSILON)).sum() / max(dot.numel(), 1)
        total = total + value_weight * (wide_t - wide_s).square().sum() / max(t.numel(), 1)
        statistics.append(torch.stack([dot, tt, ss]).flatten())
    return total, torch.cat(statistics)


def distillation_loss_backward(
    grad: Tensor,
    teacher: Sequence[Tensor],
    student: Sequence[Tensor],
    statistics: Tensor,
    direction: str,
    value_weight: float,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients by the teacher's levels, then the student's; empty tensors where ``needs`` says so."""
    dtype = _sum_dtype(teacher[0])
    by_teacher: list[Tensor] = []
    by_student: list[Tensor] = []
    start = 0
    for level, (t, s) in enumerate(zip(teacher, student, strict=True)):
        shape = (t.shape[0], 1, 1, 1) if direction == "flat" else (t.shape[0], 1, *t.shape[2:])
        count = t.shape[0] if direction == "flat" else t.shape[0] * t.shape[2] * t.shape[3]
        dot, tt, ss = statistics[start : start + 3 * count].view(3, *shape).unbind()
        start += 3 * count
        norms = (tt * ss).sqrt()
        regular = norms > EPSILON  # a clamped norm is a constant
        slope = -grad / max(count, 1) / norms.clamp_min(EPSILON)
        wide_t, wide_s = t.to(dtype), s.to(dtype)
        value = grad * 2 * value_weight / max(t.numel(), 1) * (wide_t - wide_s)
        for kept, need, like, own, other, square, sign in (
            (by_teacher, needs[level], t, wide_t, wide_s, tt, 1),
            (by_student, needs[len(teacher) + level], s, wide_s, wide_t, ss, -1),
        ):
            if not need:
                kept.append(like.new_empty(0))
                continue
            along = torch.where(regular, dot / square.clamp_min(EPSILON**2), torch.zeros_like(dot))
            kept.append((slope * (other - along * own) + sign * value).to(like.dtype))
    return by_teacher + by_student


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
