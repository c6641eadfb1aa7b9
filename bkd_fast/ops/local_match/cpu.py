"""Matching in a window on a CPU kernel (csrc/cpu/local_match.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from bkd_fast.ops.checks import check_indices
from bkd_fast.ops.cpu_common import kernels, tier, to_channels_last
from bkd_fast.ops.local_match import Arguments
from bkd_fast.ops.registration import wide


def local_match(a: Arguments) -> tuple[Tensor, Tensor]:
    """See :func:`bkd_fast.ops.local_match`. The kernel converts a half-precision support, row after row."""
    check_indices("local_match", "shots", a.shots, len(a.support), "the images of support")
    dtype, size = wide(a.query), a.query.shape[2:]
    distance = torch.empty((*a.shots.shape, *size), dtype=dtype)
    displacement = torch.empty((*a.shots.shape, 2, *size), dtype=dtype)
    support = a.support.contiguous(memory_format=torch.channels_last)
    kernels.local_match(
        tier(), to_channels_last(a.query), support, a.shots.contiguous(), a.radius, distance, displacement
    )
    return distance, displacement
