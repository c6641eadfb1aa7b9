"""Matching in a window on a CUDA kernel (csrc/cuda/local_match.cu)."""

from __future__ import annotations

from torch import Tensor

from bkd_fast.ops.cuda_common import aligned, kernels
from bkd_fast.ops.local_match import Arguments
from bkd_fast.ops.local_match.gpu import match_images, match_results


def local_match(a: Arguments) -> tuple[Tensor, Tensor]:
    """See :func:`bkd_fast.ops.local_match`."""
    own, images = (aligned(tensor) for tensor in match_images(a.query, a.support))
    distance, displacement = match_results(a.query, a.shots)
    kernels().local_match(own, images, a.shots.contiguous(), a.query.shape[1], a.radius, distance, displacement)
    return distance, displacement
