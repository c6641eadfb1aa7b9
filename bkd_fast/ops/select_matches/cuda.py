"""The pixels that match best on a CUDA kernel (csrc/cuda/select_matches.cu)."""

from __future__ import annotations

import torch
from torch import Tensor

from bkd_fast.ops.cuda_common import kernels
from bkd_fast.ops.select_matches import Arguments


def select_matches(a: Arguments) -> Tensor:
    """See :func:`bkd_fast.ops.select_matches`."""
    batch, _, *size = a.distance.shape
    positions = torch.empty((batch, *size, a.matches), dtype=torch.int64, device=a.distance.device)
    distance, displacement = (tensor.float().contiguous() for tensor in (a.distance, a.displacement))
    kernels().select_matches(distance, displacement, a.shots.contiguous(), positions)
    return positions
