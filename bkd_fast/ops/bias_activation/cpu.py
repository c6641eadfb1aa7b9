"""Bias, shortcut and activation on a CPU kernel (csrc/cpu/bias_activation.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from bkd_fast.ops.bias_activation import Arguments, layout_of
from bkd_fast.ops.cpu_common import dense, kernels, tier


def bias_activation(a: Arguments) -> Tensor:
    """See :func:`bkd_fast.ops.bias_activation`."""
    layout = layout_of(a.x)
    x = dense(a.x, layout)
    residual = None if a.residual is None else dense(a.residual, layout)
    output = torch.empty_like(x)
    kernels.bias_activation(tier(), x, dense(a.bias), residual, a.low, a.high, output)
    return output
