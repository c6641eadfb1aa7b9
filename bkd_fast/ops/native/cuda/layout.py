"""How the CUDA kernels want their arguments: registered, and starting at 16 bytes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bkd_fast.ops.gpu import layout
from bkd_fast.ops.gpu.layout import CHUNK_BYTES

NAMESPACE = "bkd_fast_cuda"  # of the operators that fill results in; the tests put in those that run on the CPU


def kernels() -> Any:
    """The registered kernels."""
    return getattr(torch.ops, NAMESPACE)


def processors(tensor: Tensor) -> int:
    """How many multiprocessors a tensor's device has; 4 where it is no CUDA device."""
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 4


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where it does not start at 16 bytes."""
    return tensor if tensor.data_ptr() % CHUNK_BYTES == 0 else tensor.clone(memory_format=torch.preserve_format)


def last(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """An image in channels-last layout that starts at 16 bytes."""
    return aligned(layout.last(tensor, dtype))
