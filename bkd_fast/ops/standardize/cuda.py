"""Averaged and standardised features on a CUDA kernel (csrc/cuda/standardize.cu)."""

from __future__ import annotations

import torch
from torch import Tensor

from bkd_fast.ops.cuda_common import aligned, kernels
from bkd_fast.ops.registration import memory_format
from bkd_fast.ops.standardize import Arguments


def standardize(a: Arguments) -> Tensor:
    """See :func:`bkd_fast.ops.standardize`."""
    x = aligned(a.x.contiguous(memory_format=memory_format(a.x)))
    mean, std = (aligned(value.float().contiguous()) for value in (a.mean, a.std))
    output = torch.empty(x.shape, dtype=torch.float32, device=x.device, memory_format=torch.channels_last)
    kernels().standardize(x, mean, std, a.patch_size, a.border, output)
    return output
