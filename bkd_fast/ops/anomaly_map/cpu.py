"""The anomaly map on CPU kernels (csrc/cpu/anomaly_map.cpp)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bkd_fast.ops.anomaly_map import Arguments
from bkd_fast.ops.anomaly_map.reference import fusion_backward
from bkd_fast.ops.cpu_common import dense_levels, empty_levels, kernels, tier


def cosine_anomaly_map(a: Arguments) -> Tensor:
    """See :func:`bkd_fast.ops.cosine_anomaly_map`."""
    teacher, student = dense_levels(a.teacher, a.student)
    output = torch.empty((teacher[0].shape[0], *a.size), dtype=teacher[0].dtype)
    kernels.anomaly_map(
        tier(), teacher, student, a.weights, a.exponents, a.value_share, a.fusion == "product", a.sigma,
        a.align_corners, output,
    )  # fmt: skip
    return output


def cosine_anomaly_map_backward(grad: Tensor, a: Arguments, needs: Sequence[bool]) -> list[Tensor]:
    """Return the gradients with respect to all tensors; empty where ``needs`` is False.

    The kernels read the features; the steps from the distances to the map are small and left to PyTorch.
    """
    teacher, student = dense_levels(a.teacher, a.student)
    shapes = [level.shape[:1] + level.shape[2:] for level in teacher]
    counts = [shape.numel() for shape in shapes]
    distances = torch.empty(sum(counts), dtype=teacher[0].dtype)
    kernels.cosine_distances(tier(), teacher, student, a.weights, a.value_share, distances)
    levels = [part.view(shape) for part, shape in zip(distances.split(counts), shapes, strict=True)]
    grad_levels = fusion_backward(grad.to(distances.dtype), levels, a)
    grad_distances = torch.cat([part.reshape(-1) for part in grad_levels])
    gradients = empty_levels([*teacher, *student], needs)
    kernels.cosine_distances_backward(
        tier(), grad_distances, teacher, student, a.weights, a.value_share, gradients[: len(teacher)],
        gradients[len(teacher) :],
    )  # fmt: skip
    return gradients
