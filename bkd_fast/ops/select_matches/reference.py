"""The pixels that match best in plain PyTorch: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from bkd_fast.ops.select_matches import Arguments


def select_matches(a: Arguments) -> Tensor:
    """See :func:`bkd_fast.ops.select_matches`."""
    return selected(*a)


def selected(distance: Tensor, displacement: Tensor, shots: Tensor, matches: int) -> Tensor:
    """Return the same; the arguments one by one."""
    # NaN is sorted behind all numbers, and of equal distances the first shot stays in front.
    return positions(displacement, shots, distance.sort(dim=1, stable=True).indices[:, :matches])


def positions(displacement: Tensor, shots: Tensor, nearest: Tensor) -> Tensor:
    """Return positions (N, H, W, matches); ``nearest`` (N, matches, H, W) says which shots match best."""
    height, width = nearest.shape[2:]
    images = shots[:, :, None, None].expand(-1, -1, height, width).gather(1, nearest)
    moved = displacement.gather(1, nearest.unsqueeze(2).expand(-1, -1, 2, -1, -1)).long()
    rows = torch.arange(height, device=nearest.device).unsqueeze(1) + moved[:, :, 0]
    columns = torch.arange(width, device=nearest.device) + moved[:, :, 1]
    return ((images * height + rows) * width + columns).permute(0, 2, 3, 1)
