"""Matching in a window in plain PyTorch: the specification."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bkd_fast.ops.checks import check_indices
from bkd_fast.ops.local_match import Arguments
from bkd_fast.ops.registration import wide


def local_match(a: Arguments) -> tuple[Tensor, Tensor]:
    """See :func:`bkd_fast.ops.local_match`."""
    if a.shots.device.type == "cpu":
        check_indices("local_match", "shots", a.shots, len(a.support), "the images of support")
        return match(a.query, a.support, a.shots, a.radius)
    support, shots = a.support, a.shots
    if not len(support):  # without images there are no distances
        support = support.new_full((1, *support.shape[1:]), torch.nan)
        shots = torch.zeros_like(shots)
    last = len(support) - 1
    distance, displacement = match(a.query, support, shots.clamp(0, last), a.radius)
    exists = ((shots >= 0) & (shots <= last))[:, :, None, None]
    return distance.masked_fill(~exists, torch.nan), displacement.masked_fill(~exists.unsqueeze(2), 0)


def match(query: Tensor, support: Tensor, shots: Tensor, radius: int) -> tuple[Tensor, Tensor]:
    """Return the same for shots that are known to be images of the support."""
    dtype = wide(query)
    height, width = query.shape[2:]
    own = query.to(dtype).unsqueeze(1)
    images = support.index_select(0, shots.flatten()).to(dtype)
    # Pixels outside are NaN, and lose as any NaN does.
    images = F.pad(images, [radius] * 4, value=torch.nan).unflatten(0, shots.shape)

    def distances(dy: int, dx: int) -> Tensor:
        top, left = radius + dy, radius + dx
        return (own - images[..., top : top + height, left : left + width]).square().mean(2)

    distance = distances(0, 0)
    y, x = torch.zeros_like(distance), torch.zeros_like(distance)
    for dy, dx in displacements(radius)[1:]:
        other = distances(dy, dx)
        better = ~other.isnan() & ~(distance <= other)
        distance = torch.where(better, other, distance)
        y, x = torch.where(better, float(dy), y), torch.where(better, float(dx), x)
    return distance, torch.stack([y, x], 2)


def displacements(radius: int) -> list[tuple[int, int]]:
    """Return the window's (dy, dx) in the order in which equal distances are preferred."""
    side = range(-radius, radius + 1)
    return sorted(((dy, dx) for dy in side for dx in side), key=lambda d: (d[0] ** 2 + d[1] ** 2, d))
