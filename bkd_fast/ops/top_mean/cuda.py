"""The mean of the largest values on a CUDA kernel (csrc/cuda/top_mean.cu)."""

from __future__ import annotations

from torch import Tensor

from bkd_fast.ops.cuda_common import kernels
from bkd_fast.ops.layout import floats
from bkd_fast.ops.top_mean import Arguments


def top_mean(a: Arguments) -> Tensor:
    """See :func:`bkd_fast.ops.top_mean`."""
    mean = floats((len(a.values),), a.values)
    kernels().top_mean(a.values.float().contiguous(), a.largest, mean)
    return mean
