"""The mean of the largest values on a CPU kernel (csrc/cpu/top_mean.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from bkd_fast.ops.cpu_common import dense, kernels, tier
from bkd_fast.ops.registration import wide
from bkd_fast.ops.top_mean import Arguments


def top_mean(a: Arguments) -> Tensor:
    """See :func:`bkd_fast.ops.top_mean`."""
    mean = torch.empty(len(a.values), dtype=wide(a.values))
    kernels.top_mean(tier(), dense(a.values), a.largest, mean)
    return mean
