"""The distance of rows from the combination of their neighbours on a CUDA kernel (csrc/cuda/neighbor_residual.cu)."""

from __future__ import annotations

from torch import Tensor

from bkd_fast.ops.cuda_common import aligned, kernels
from bkd_fast.ops.layout import floats
from bkd_fast.ops.neighbor_regression.gpu import rows_and_bank
from bkd_fast.ops.neighbor_residual import Arguments


def neighbor_residual(a: Arguments) -> tuple[Tensor, Tensor]:
    """See :func:`bkd_fast.ops.neighbor_residual`."""
    query, bank = rows_and_bank(a.regression)
    residual, means = floats((len(query),), query), floats((len(query), a.values.shape[1]), query)
    kernels().neighbor_residual(
        aligned(query), aligned(bank), a.neighbors.contiguous(), a.values.float().contiguous(), a.query.shape[1],
        a.ridge, residual, means,
    )  # fmt: skip
    return residual, means
