"""Bias, shortcut and activation in plain PyTorch: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from bkd_fast.ops.bias_activation import Arguments


def bias_activation(a: Arguments) -> Tensor:
    """See :func:`bkd_fast.ops.bias_activation`."""
    wide = torch.float64 if a.x.dtype == torch.float64 else torch.float32
    total = a.x.to(wide) + a.bias.to(wide).view(1, -1, 1, 1)
    if a.residual is not None:
        total = total + a.residual.to(wide)
    return total.clamp(a.low, a.high).to(a.x.dtype)
