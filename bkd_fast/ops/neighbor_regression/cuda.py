"""Rows as combinations of their neighbours on CUDA kernels (csrc/cuda/neighbor_regression.cu)."""

from __future__ import annotations

from torch import Tensor

from bkd_fast.ops.cuda_common import aligned, kernels
from bkd_fast.ops.neighbor_regression import Arguments
from bkd_fast.ops.neighbor_regression.gpu import regression_arguments


def neighbor_regression(a: Arguments) -> Tensor:
    """See :func:`bkd_fast.ops.neighbor_regression`."""
    query, bank, output = regression_arguments(a)
    kernels().neighbor_regression(aligned(query), aligned(bank), a.neighbors.contiguous(), a.ridge, output)
    return output[:, : a.query.shape[1]]
