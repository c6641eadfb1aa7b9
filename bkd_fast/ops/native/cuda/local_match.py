"""Matching in a window on a CUDA kernel (csrc/cuda/local_match.cu)."""

from __future__ import annotations

from torch import Tensor

from bkd_fast.ops.gpu.matching import match_images, match_results
from bkd_fast.ops.native.cuda.layout import aligned, kernels


def local_match(query: Tensor, support: Tensor, shots: Tensor, radius: int) -> tuple[Tensor, Tensor]:
    """See :func:`bkd_fast.ops.local_match`."""
    own, images = (aligned(tensor) for tensor in match_images(query, support))
    distance, displacement = match_results(query, shots)
    kernels().local_match(own, images, shots.contiguous(), query.shape[1], radius, distance, displacement)
    return distance, displacement
