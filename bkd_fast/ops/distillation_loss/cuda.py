"""The distillation loss on CUDA kernels (csrc/cuda/distillation_loss.cu)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from bkd_fast.ops.cuda_common import aligned, kernels, multiprocessors
from bkd_fast.ops.distillation_loss import Arguments
from bkd_fast.ops.layout import floats
from bkd_fast.ops.levels import Levels

PIXELS = 32  # that a block sums up


def distillation_loss(a: Arguments) -> tuple[Tensor, Tensor]:
    """See :func:`bkd_fast.ops.distillation_loss`; also return the statistics that the reference describes."""
    levels, flat = Levels(a.teacher, a.student, aligned), a.direction == "flat"
    images = len(a.teacher[0])
    # An image is split over all multiprocessors; the parts are added in one order.
    splits = max(1, min(64, math.ceil(4 * multiprocessors(a.teacher[0]) / max(images, 1))))
    counts = [images if flat else images * level.shape[2:].numel() for level in a.teacher]
    statistics = floats((3 * sum(counts),), a.teacher[0])
    parts = [floats((images, splits, 4) if flat else (math.ceil(count / PIXELS), 2), a.teacher[0]) for count in counts]
    output = floats((), a.teacher[0])
    kernels().distillation_loss(
        levels.teacher, levels.student, levels.channels, flat, a.value_weight, splits,
        list(statistics.split([3 * count for count in counts])), parts, output,
    )  # fmt: skip
    return output, statistics


def distillation_loss_backward(grad: Tensor, statistics: Tensor, a: Arguments, needs: Sequence[bool]) -> list[Tensor]:
    """Return the gradients with respect to all tensors; empty where ``needs`` is False."""
    levels, flat = Levels(a.teacher, a.student, aligned), a.direction == "flat"
    counts = [len(level) if flat else len(level) * level.shape[2:].numel() for level in a.teacher]
    grad_teacher, grad_student = levels.buffers(needs)
    kernels().distillation_loss_backward(
        grad.float().contiguous(), levels.teacher, levels.student, levels.channels, flat, a.value_weight,
        list(statistics.split([3 * count for count in counts])), grad_teacher, grad_student,
    )  # fmt: skip
    return levels.results([*grad_teacher, *grad_student], [*a.teacher, *a.student], needs)
