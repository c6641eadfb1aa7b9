"""The nearest rows on a CUDA kernel (csrc/cuda/nearest_rows.cu), which is given all products by cuBLAS."""

from __future__ import annotations

from torch import Tensor

from bkd_fast.ops.cuda_common import kernels
from bkd_fast.ops.nearest_rows import Arguments
from bkd_fast.ops.nearest_rows.gpu import problems


def nearest_rows(a: Arguments) -> Tensor:
    """See :func:`bkd_fast.ops.nearest_rows`."""
    index, halves, parts = problems(a)
    for products, own in parts:
        kernels().nearest_rows(products, halves, own)
    return index
