"""The distillation loss of Eq. 11-12 in plain PyTorch: the specification."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bkd_fast.ops.distillation_loss import Arguments
from bkd_fast.ops.registration import wide

EPSILON = 1e-8  # smallest product of norms in a cosine


def distillation_loss(a: Arguments) -> tuple[Tensor, Tensor]:
    """See :func:`bkd_fast.ops.distillation_loss`; also return the flat statistics that the gradient needs.

    They are the dot product, the teacher's squared norm and the student's, (3, vectors) for each level. A vector is an
    image for ``flat``, a position for ``pixel``.
    """
    dtype = wide(a.teacher[0])
    total = torch.zeros((), dtype=dtype, device=a.teacher[0].device)
    statistics = []
    for t, s in zip(a.teacher, a.student, strict=True):
        wide_t, wide_s = t.to(dtype), s.to(dtype)
        dims = (1, 2, 3) if a.direction == "flat" else (1,)
        dot, tt, ss = (wide_t * wide_s).sum(dims), wide_t.square().sum(dims), wide_s.square().sum(dims)
        total = total + (1 - dot / (tt * ss).sqrt().clamp_min(EPSILON)).sum() / max(dot.numel(), 1)
        total = total + a.value_weight * (wide_t - wide_s).square().sum() / max(t.numel(), 1)
        statistics.append(torch.stack([dot, tt, ss]).flatten())
    return total, torch.cat(statistics)


def distillation_loss_backward(grad: Tensor, statistics: Tensor, a: Arguments, needs: Sequence[bool]) -> list[Tensor]:
    """Return the gradients with respect to all tensors; empty where ``needs`` is False."""
    dtype = wide(a.teacher[0])
    grad_teacher: list[Tensor] = []
    grad_student: list[Tensor] = []
    start = 0
    for level, (t, s) in enumerate(zip(a.teacher, a.student, strict=True)):
        shape = (t.shape[0], 1, 1, 1) if a.direction == "flat" else (t.shape[0], 1, *t.shape[2:])
        count = t.shape[0] if a.direction == "flat" else t.shape[0] * t.shape[2] * t.shape[3]
        dot, tt, ss = statistics[start : start + 3 * count].view(3, *shape).unbind()
        start += 3 * count
        norms = (tt * ss).sqrt()
        regular = norms > EPSILON  # a clamped norm is a constant
        slope = -grad / max(count, 1) / norms.clamp_min(EPSILON)
        wide_t, wide_s = t.to(dtype), s.to(dtype)
        value = grad * 2 * a.value_weight / max(t.numel(), 1) * (wide_t - wide_s)
        for kept, need, like, own, other, square, sign in (
            (grad_teacher, needs[level], t, wide_t, wide_s, tt, 1),
            (grad_student, needs[len(a.teacher) + level], s, wide_s, wide_t, ss, -1),
        ):
            if not need:
                kept.append(like.new_empty(0))
                continue
            along = torch.where(regular, dot / square.clamp_min(EPSILON**2), torch.zeros_like(dot))
            kept.append((slope * (other - along * own) + sign * value).to(like.dtype))
    return grad_teacher + grad_student
