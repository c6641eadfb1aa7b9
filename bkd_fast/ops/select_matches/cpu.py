"""The pixels that match best on a CPU kernel (csrc/cpu/select_matches.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from bkd_fast.ops.cpu_common import dense, kernels, tier
from bkd_fast.ops.select_matches import Arguments


def select_matches(a: Arguments) -> Tensor:
    """See :func:`bkd_fast.ops.select_matches`."""
    batch, _, *size = a.distance.shape
    positions = torch.empty((batch, *size, a.matches), dtype=torch.int64)
    kernels.select_matches(tier(), dense(a.distance), dense(a.displacement), a.shots.contiguous(), positions)
    return positions
