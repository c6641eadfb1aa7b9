"""Bias, shortcut and activation on a CUDA kernel (csrc/cuda/bias_activation.cu)."""

from __future__ import annotations

import torch
from torch import Tensor

from bkd_fast.ops.bias_activation import Arguments, layout_of
from bkd_fast.ops.cuda_common import aligned, kernels
from bkd_fast.ops.layout import CHUNK_BYTES


def bias_activation(a: Arguments) -> Tensor:
    """See :func:`bkd_fast.ops.bias_activation`."""
    layout = layout_of(a.x)
    x = aligned(a.x if _is_slice(a.x) else a.x.contiguous(memory_format=layout))
    residual = None if a.residual is None else aligned(a.residual.contiguous(memory_format=layout))
    output = torch.empty(a.x.shape, dtype=a.x.dtype, device=a.x.device, memory_format=layout)
    kernels().bias_activation(x, aligned(a.bias.contiguous()), residual, a.low, a.high, output)
    return output


def _is_slice(x: Tensor) -> bool:
    """Whether these are rows of whole chunks in a larger channels_last image, which the kernel reads where they are."""
    chunk = CHUNK_BYTES // x.element_size()
    return (
        x.stride(1) == 1
        and x.stride(3) == x.shape[1]
        and not any(size % chunk for size in (x.shape[1], x.stride(0), x.stride(2)))
        and x.data_ptr() % CHUNK_BYTES == 0
    )
