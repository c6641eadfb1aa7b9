"""What the operators need to call the CUDA kernels: the registered kernels, and tensors that start at 16 bytes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bkd_fast.ops import layout
from bkd_fast.ops.layout import CHUNK_BYTES

NAMESPACE = "bkd_fast_cuda"  # of the kernels; the tests replace it by those that run on the CPU


def kernels() -> Any:
    """Return the registered kernels."""
    return getattr(torch.ops, NAMESPACE)


def multiprocessors(tensor: Tensor) -> int:
    """Return the number of multiprocessors of a tensor's device; 4 if it is no CUDA device."""
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 4


def aligned(tensor: Tensor) -> Tensor:
    """Return the tensor, or a copy if it does not start at 16 bytes."""
    return tensor if tensor.data_ptr() % CHUNK_BYTES == 0 else tensor.clone(memory_format=torch.preserve_format)


def to_channels_last(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return an image in channels-last layout that starts at 16 bytes."""
    return aligned(layout.to_channels_last(tensor, dtype))
