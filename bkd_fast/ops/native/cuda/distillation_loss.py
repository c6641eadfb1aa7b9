"""The distillation loss on CUDA kernels (csrc/cuda/distillation_loss.cu)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from bkd_fast.ops.gpu.layout import floats
from bkd_fast.ops.gpu.levels import Levels
from bkd_fast.ops.native.cuda.layout import aligned, kernels, processors

PIXELS = 32  # that a block sums up


def distillation_loss(
    teacher: Sequence[Tensor], student: Sequence[Tensor], direction: str, value_weight: float
) -> tuple[Tensor, Tensor]:
    """See :func:`bkd_fast.ops.distillation_loss`; also the statistics that the reference describes."""
    levels, by_image = Levels(teacher, student, aligned), direction == "flat"
    images = len(teacher[0])
    # An image is split so that every processor has work; the parts are added in one order.
    splits = max(1, min(64, math.ceil(4 * processors(teacher[0]) / max(images, 1))))
    counts = [images if by_image else images * level.shape[2:].numel() for level in teacher]
    statistics = floats((3 * sum(counts),), teacher[0])
    parts = [
        floats((images, splits, 4) if by_image else (math.ceil(count / PIXELS), 2), teacher[0]) for count in counts
    ]
    output = floats((), teacher[0])
    kernels().distillation_loss(
        levels.teacher, levels.student, levels.channels, by_image, value_weight, splits,
        list(statistics.split([3 * count for count in counts])), parts, output,
    )  # fmt: skip
    return output, statistics


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
    levels, by_image = Levels(teacher, student, aligned), direction == "flat"
    counts = [len(level) if by_image else len(level) * level.shape[2:].numel() for level in teacher]
    by_teacher, by_student = levels.room(needs)
    kernels().distillation_loss_backward(
        grad.float().contiguous(), levels.teacher, levels.student, levels.channels, by_image, value_weight,
        list(statistics.split([3 * count for count in counts])), by_teacher, by_student,
    )  # fmt: skip
    return levels.results([*by_teacher, *by_student], [*teacher, *student], needs)
