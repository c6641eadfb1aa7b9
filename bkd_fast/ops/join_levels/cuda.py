"""Levels side by side on a CUDA kernel (csrc/cuda/join_levels.cu)."""

from __future__ import annotations

from torch import Tensor

from bkd_fast.ops.cuda_common import aligned, kernels
from bkd_fast.ops.join_levels import Arguments
from bkd_fast.ops.join_levels.gpu import sources


def join_levels(a: Arguments) -> Tensor:
    """See :func:`bkd_fast.ops.join_levels`."""
    levels, blocks, output = sources(a)
    kernels().join_levels(
        [aligned(level) for level in levels], a.factors, [length for own in blocks for length in own], output
    )
    return output
