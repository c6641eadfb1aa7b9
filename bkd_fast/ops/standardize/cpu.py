"""Averaged and standardised features on a CPU kernel (csrc/cpu/standardize.cpp), with the bits of the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from bkd_fast.ops.cpu_common import dense, kernels, tier, to_channels_last
from bkd_fast.ops.registration import memory_format, wide
from bkd_fast.ops.standardize import Arguments, reference


def standardize(a: Arguments) -> Tensor:
    """See :func:`bkd_fast.ops.standardize`. Any ``border`` but 0 and 1 is left to PyTorch."""
    if a.patch_size > 1 and a.border not in (0, 1):
        return reference.standardize(a)
    x = dense(a.x, memory_format(a.x)) if a.patch_size == 1 else to_channels_last(a.x)
    output = torch.empty(x.shape, dtype=wide(x), memory_format=torch.channels_last)
    kernels.standardize(tier(), x, dense(a.mean), dense(a.std), a.patch_size, a.border == 1, output)
    return output
