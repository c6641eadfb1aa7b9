"""The anomaly map of Eq. 13 in plain PyTorch: the specification."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bkd_fast.ops.anomaly_map import Arguments
from bkd_fast.ops.registration import wide

EPSILON = 1e-8  # smallest product of norms in a cosine
MIN_DISTANCE = 1e-6  # that is raised to a power: below it a cosine in float32 is rounding, of either sign


def cosine_anomaly_map(a: Arguments) -> Tensor:
    """See :func:`bkd_fast.ops.cosine_anomaly_map`."""
    distances = raised(_distances(a.teacher, a.student, a.weights, a.value_share), a.exponents)
    return _smooth(_fuse([_upsample(level, a.size, a.align_corners) for level in distances], a.fusion), a.sigma)


def cosine_anomaly_map_backward(grad: Tensor, a: Arguments, needs: Sequence[bool]) -> list[Tensor]:
    """Return the gradients with respect to all tensors; empty where ``needs`` is False."""
    count = len(a.teacher)
    distances = _distances(a.teacher, a.student, a.weights, a.value_share)
    grad_distances = fusion_backward(grad, distances, a)
    gradients: list[Tensor | None] = [None] * (count + len(a.student))
    for level, t in enumerate(a.teacher):
        for index in range(level, len(a.student), count):
            own = (needs[level], needs[count + index])
            grad_t, grad_s = _distance_backward(
                grad_distances[level] * a.weights[index], t, a.student[index], a.value_share, own
            )
            if grad_t is not None:
                earlier = gradients[level]
                gradients[level] = grad_t if earlier is None else earlier + grad_t
            gradients[count + index] = grad_s
    return [
        like.new_empty(0) if value is None else value.to(like.dtype)
        for value, like in zip(gradients, [*a.teacher, *a.student], strict=True)
    ]


def fusion_backward(grad: Tensor, distances: Sequence[Tensor], a: Arguments) -> list[Tensor]:
    """Return the gradients with respect to the distances of each level, (N, H_l, W_l), before they are raised."""
    grad_fused = _smooth(grad, a.sigma, adjoint=True)
    powers = raised(distances, a.exponents)
    levels = [_upsample(level, a.size, a.align_corners) for level in powers]
    gradients = []
    for level, distance in enumerate(distances):
        grad_level = grad_fused
        if a.fusion == "product":
            for other in levels[:level] + levels[level + 1 :]:
                grad_level = grad_level * other
        gradient = _upsample_adjoint(grad_level, distance.shape[1:], a.align_corners)
        if a.exponents[level] != 1:
            slope = a.exponents[level] * powers[level] / distance.clamp_min(MIN_DISTANCE)
            gradient = torch.where(distance > MIN_DISTANCE, slope, torch.zeros_like(slope)) * gradient
        gradients.append(gradient)
    return gradients


def raised(distances: Sequence[Tensor], exponents: Sequence[float]) -> list[Tensor]:
    """Raise the distances of each level to its exponent."""
    return [
        level if exponent == 1 else level.clamp_min(MIN_DISTANCE) ** exponent
        for level, exponent in zip(distances, exponents, strict=True)
    ]


def _distances(
    teacher: Sequence[Tensor], student: Sequence[Tensor], weights: Sequence[float], value_share: float
) -> list[Tensor]:
    """Return Omega^n of every level, summed over the branches: (N, H_l, W_l)."""
    levels = []
    for level, t in enumerate(teacher):
        total: Tensor | None = None
        for index in range(level, len(student), len(teacher)):
            part = _distance(t, student[index], value_share) * weights[index]
            total = part if total is None else total + part
        assert total is not None
        levels.append(total)
    return levels


def _upsample(distances: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    upsampled = F.interpolate(distances.unsqueeze(1), tuple(size), mode="bilinear", align_corners=align_corners)
    return upsampled.squeeze(1)


def _fuse(levels: Sequence[Tensor], fusion: str) -> Tensor:
    total = levels[0]
    for level in levels[1:]:
        total = total * level if fusion == "product" else total + level
    return total


def _distance(teacher: Tensor, student: Tensor, share: float) -> Tensor:
    """(N, H, W): (1 - share) (1 - cos) + share * mean squared difference, in float32 at least."""
    t, s = teacher.to(wide(teacher)), student.to(wide(student))
    norms = (t.square().sum(1) * s.square().sum(1)).sqrt().clamp_min(EPSILON)
    return (1 - share) * (1 - (t * s).sum(1) / norms) + share * (t - s).square().mean(1)


def _distance_backward(
    grad: Tensor, teacher: Tensor, student: Tensor, share: float, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    t, s, grad = teacher.to(wide(teacher)), student.to(wide(student)), grad.unsqueeze(1)
    dot, tt, ss = (t * s).sum(1, True), t.square().sum(1, True), s.square().sum(1, True)
    norms = (tt * ss).sqrt()
    slope = -(1 - share) * grad / norms.clamp_min(EPSILON)
    value = share * 2 / t.shape[1] * grad * (t - s)
    regular = norms > EPSILON  # a clamped norm is a constant

    def along(square: Tensor) -> Tensor:
        return torch.where(regular, dot / square.clamp_min(EPSILON**2), torch.zeros_like(dot))

    grad_teacher = slope * (s - along(tt) * t) + value if needs[0] else None
    grad_student = slope * (t - along(ss) * s) - value if needs[1] else None
    return grad_teacher, grad_student


def _upsample_adjoint(grad: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    """Multiply by the transposed matrices of both directions.

    PyTorch's adjoint of upsampling does not sum in one order on CUDA, and needs sizes that a compiler may not know.
    """
    rows, columns = (
        F.interpolate(
            torch.eye(small, dtype=grad.dtype, device=grad.device)[None, None],
            (large, small),
            mode="bilinear",
            align_corners=align_corners,
        )[0, 0]
        for small, large in zip(size, grad.shape[1:], strict=True)
    )
    return rows.t() @ grad @ columns


def _smooth(maps: Tensor, sigma: float, *, adjoint: bool = False) -> Tensor:
    """Gaussian of (N, H, W), radius 4 sigma, mirrored at the border: scipy.ndimage.gaussian_filter's default."""
    if sigma == 0:
        return maps
    rows, columns = (_smoothing_matrix(length, sigma, maps) for length in maps.shape[1:])
    return rows.t() @ maps @ columns if adjoint else rows @ maps @ columns.t()


def _smoothing_matrix(length: int, sigma: float, like: Tensor) -> Tensor:
    """(length, length); mirroring is folded into it, so that a radius beyond the image needs no special case."""
    radius = int(4 * sigma + 0.5)
    steps = torch.arange(-radius, radius + 1, device=like.device)
    kernel = torch.exp(-0.5 * (steps.to(like.dtype) / sigma) ** 2)
    reached = torch.arange(length, device=like.device).unsqueeze(1) + steps
    folded = reached.remainder(2 * length)
    folded = torch.minimum(folded, 2 * length - 1 - folded)
    matrix = torch.zeros(length, length, dtype=like.dtype, device=like.device)
    return matrix.scatter_add(1, folded, (kernel / kernel.sum()).expand(length, -1))
