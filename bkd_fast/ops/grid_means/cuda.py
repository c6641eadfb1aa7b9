"""Means over the cells of a grid on a CUDA kernel (csrc/cuda/grid_means.cu)."""

from __future__ import annotations

from torch import Tensor

from bkd_fast.ops.cuda_common import kernels
from bkd_fast.ops.grid_means import Arguments
from bkd_fast.ops.grid_means.gpu import images_and_means


def grid_means(a: Arguments) -> Tensor:
    """See :func:`bkd_fast.ops.grid_means`."""
    x, means = images_and_means(a)
    kernels().grid_means(x, a.grid, means)
    return means
