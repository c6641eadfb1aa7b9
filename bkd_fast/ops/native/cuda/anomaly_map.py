"""The anomaly map on CUDA kernels (csrc/cuda/anomaly_map.cu)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bkd_fast.ops import reference
from bkd_fast.ops.gpu.layout import floats
from bkd_fast.ops.gpu.levels import Levels
from bkd_fast.ops.native.cuda.layout import aligned, kernels

MOST_LEVELS = 8
MOST_RADIUS = 5_800  # of the smoothing, for which the weights and a row's neighbours fit in shared memory


def cosine_anomaly_map(
    teacher: Sequence[Tensor],
    student: Sequence[Tensor],
    size: Sequence[int],
    fusion: str,
    sigma: float,
    weights: Sequence[float],
    exponents: Sequence[float],
    align_corners: bool,
    value_share: float,
) -> Tensor:
    """See :func:`bkd_fast.ops.cosine_anomaly_map`.

    Raises:
        RuntimeError: more than MOST_LEVELS levels, or a sigma of which four do not fit in MOST_RADIUS.
    """
    radius = int(4 * sigma + 0.5)
    if len(teacher) > MOST_LEVELS or radius > MOST_RADIUS:
        raise RuntimeError(
            f"cosine_anomaly_map: the CUDA kernels take up to {MOST_LEVELS} levels and sigma up to {MOST_RADIUS // 4}, "
            f'not {len(teacher)} and {sigma}; run it with bkd_fast.backend("reference")'
        )
    distances, _ = _distances(Levels(teacher, student, aligned), weights, value_share, statistics=False)
    distances = reference.raised(distances, exponents)
    output = floats((teacher[0].shape[0], *size), teacher[0])
    rows = torch.empty_like(output) if radius else output.new_empty(0)
    kernels().anomaly_map(distances, fusion == "product", sigma, radius, align_corners, rows, output)
    return output


def cosine_anomaly_map_backward(
    grad: Tensor,
    teacher: Sequence[Tensor],
    student: Sequence[Tensor],
    size: Sequence[int],
    fusion: str,
    sigma: float,
    weights: Sequence[float],
    exponents: Sequence[float],
    align_corners: bool,
    value_share: float,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients by the teacher's levels, then the students'; empty tensors where ``needs`` says so.

    The kernels read the features; what lies between the distances and the map is small and left to PyTorch.
    """
    levels = Levels(teacher, student, aligned)
    distances, statistics = _distances(levels, weights, value_share, statistics=True)
    by_distance = reference.fusion_backward(grad, distances, size, fusion, sigma, exponents, align_corners)
    by_teacher, by_student = levels.room(needs)
    kernels().cosine_distances_backward(
        [part.contiguous() for part in by_distance], levels.teacher, levels.student, list(weights), value_share,
        levels.channels, statistics, by_teacher, by_student,
    )  # fmt: skip
    return levels.results([*by_teacher, *by_student], [*teacher, *student], needs)


def _distances(
    levels: Levels, weights: Sequence[float], value_share: float, *, statistics: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Distances (N, H, W) of each level, and if asked for the sums (branch, 3, N H W) that gradients need."""
    branches = len(levels.student) // len(levels.teacher)
    distances = [floats((len(t), *t.shape[2:]), t) for t in levels.teacher]
    sums = [floats((branches, 3, found.numel()), found) for found in distances] if statistics else []
    kernels().cosine_distances(
        levels.teacher, levels.student, list(weights), value_share, levels.channels, distances, sums
    )
    return distances, sums
