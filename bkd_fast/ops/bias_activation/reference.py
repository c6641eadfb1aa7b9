"""Bias, shortcut and activation in plain PyTorch: the specification."""

from __future__ import annotations

from torch import Tensor

from bkd_fast.ops.bias_activation import Arguments
from bkd_fast.ops.registration import wide


def bias_activation(a: Arguments) -> Tensor:
    """See :func:`bkd_fast.ops.bias_activation`."""
    dtype = wide(a.x)
    total = a.x.to(dtype) + a.bias.to(dtype).view(1, -1, 1, 1)
    if a.residual is not None:
        total = total + a.residual.to(dtype)
    return total.clamp(a.low, a.high).to(a.x.dtype)
