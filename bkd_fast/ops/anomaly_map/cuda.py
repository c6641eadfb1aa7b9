"""The anomaly map on CUDA kernels (csrc/cuda/anomaly_map.cu)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bkd_fast.ops.anomaly_map import Arguments, reference
from bkd_fast.ops.cuda_common import aligned, kernels
from bkd_fast.ops.layout import floats
from bkd_fast.ops.levels import Levels

MAX_LEVELS = 8
MAX_RADIUS = 5_800  # of the smoothing, for which the weights and a row's neighbours fit in shared memory


def cosine_anomaly_map(a: Arguments) -> Tensor:
    """See :func:`bkd_fast.ops.cosine_anomaly_map`.

    Raises:
        RuntimeError: more than MAX_LEVELS levels, or a radius (4 sigma) beyond MAX_RADIUS.
    """
    radius = int(4 * a.sigma + 0.5)
    if len(a.teacher) > MAX_LEVELS or radius > MAX_RADIUS:
        raise RuntimeError(
            f"cosine_anomaly_map: the CUDA kernels take up to {MAX_LEVELS} levels and sigma up to {MAX_RADIUS // 4}, "
            f'not {len(a.teacher)} and {a.sigma}; run it with bkd_fast.backend("reference")'
        )
    distances, _ = _distances(Levels(a.teacher, a.student, aligned), a, statistics=False)
    output = floats((a.teacher[0].shape[0], *a.size), a.teacher[0])
    rows = torch.empty_like(output) if radius else output.new_empty(0)
    kernels().anomaly_map(distances, a.fusion == "product", a.sigma, radius, a.align_corners, rows, output)
    return output


def cosine_anomaly_map_backward(grad: Tensor, a: Arguments, needs: Sequence[bool]) -> list[Tensor]:
    """Return the gradients with respect to all tensors; empty where ``needs`` is False.

    The kernels read the features; the steps from the distances to the map are small and left to PyTorch.
    """
    levels = Levels(a.teacher, a.student, aligned)
    distances, statistics = _distances(levels, a, statistics=True)
    grad_distance = reference.fusion_backward(grad, distances, a)
    grad_teacher, grad_student = levels.buffers(needs)
    kernels().cosine_distances_backward(
        [part.contiguous() for part in grad_distance], levels.teacher, levels.student, a.weights, a.value_share,
        levels.channels, statistics, grad_teacher, grad_student,
    )  # fmt: skip
    return levels.results([*grad_teacher, *grad_student], [*a.teacher, *a.student], needs)


def _distances(levels: Levels, a: Arguments, *, statistics: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Return the distances (N, H, W) of each level, raised to its exponent.

    With ``statistics``, for gradients: not raised, and the sums (branch, 3, N H W) of each level.
    """
    exponents = [1.0] * len(levels.teacher) if statistics else a.exponents
    branches = len(levels.student) // len(levels.teacher)
    distances = [floats((len(t), *t.shape[2:]), t) for t in levels.teacher]
    sums = [floats((branches, 3, part.numel()), part) for part in distances] if statistics else []
    kernels().cosine_distances(
        levels.teacher, levels.student, a.weights, exponents, a.value_share, levels.channels, distances, sums
    )
    return distances, sums
