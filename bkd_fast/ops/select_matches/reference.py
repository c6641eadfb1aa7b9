"""The pixels that match best in plain PyTorch: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from bkd_fast.ops.select_matches import Arguments


def select_matches(a: Arguments) -> Tensor:
    """See :func:`bkd_fast.ops.select_matches`."""
    return selected(*a)


def selected(distance: Tensor, displacement: Tensor, shots: Tensor, count: int) -> Tensor:
    """Return the same; the arguments one by one, as an exported graph has them."""
    height, width = distance.shape[2:]
    # Infinity in place of NaN would tie with a real infinity: NaN is sorted behind all numbers as it is.
    nearest = distance.sort(dim=1, stable=True).indices[:, :count]
    images = shots[:, :, None, None].expand_as(distance).gather(1, nearest)
    moved = displacement.gather(1, nearest.unsqueeze(2).expand(-1, -1, 2, -1, -1)).long()
    rows = torch.arange(height, device=distance.device).unsqueeze(1) + moved[:, :, 0]
    columns = torch.arange(width, device=distance.device) + moved[:, :, 1]
    return ((images * height + rows) * width + columns).permute(0, 2, 3, 1)
