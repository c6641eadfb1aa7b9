"""The distillation loss on CPU kernels (csrc/cpu/distillation_loss.cpp)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bkd_fast.ops.cpu_common import dense, dense_levels, empty_levels, kernels, tier
from bkd_fast.ops.distillation_loss import Arguments


def distillation_loss(a: Arguments) -> tuple[Tensor, Tensor]:
    """See :func:`bkd_fast.ops.distillation_loss`; also return the statistics that the reference describes."""
    pixels = a.direction == "pixel"
    teacher, student = dense_levels(a.teacher, a.student)
    vectors = sum(level.shape[0] * (level.shape[2:].numel() if pixels else 1) for level in teacher)
    statistics = torch.empty(3 * vectors, dtype=teacher[0].dtype)
    output = torch.empty((), dtype=teacher[0].dtype)
    kernels.distillation_loss(tier(), teacher, student, pixels, a.value_weight, statistics, output)
    return output, statistics


def distillation_loss_backward(grad: Tensor, statistics: Tensor, a: Arguments, needs: Sequence[bool]) -> list[Tensor]:
    """Return the gradients with respect to all tensors; empty where ``needs`` is False."""
    teacher, student = dense_levels(a.teacher, a.student)
    gradients = empty_levels([*teacher, *student], needs)
    kernels.distillation_loss_backward(
        tier(), dense(grad), teacher, student, statistics, a.direction == "pixel", a.value_weight,
        gradients[: len(teacher)], gradients[len(teacher) :],
    )  # fmt: skip
    return gradients
