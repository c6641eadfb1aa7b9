"""How the CUDA kernels want their arguments: dense, in whole chunks of 16 bytes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

NAMESPACE = "bkd_fast_cuda"  # of the operators that fill results in; the tests put in those that run on the CPU
CHUNK_BYTES = 16


def kernels() -> Any:
    """The registered kernels."""
    return getattr(torch.ops, NAMESPACE)


def processors(tensor: Tensor) -> int:
    """How many multiprocessors a tensor's device has; 4 where it is no CUDA device."""
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 4


def whole_chunks(tensor: Tensor, dim: int, piece: int) -> Tensor:
    """Zeros behind each ``piece`` numbers along ``dim``, as many as fill 16 bytes; the tensor itself without any."""
    missing = -piece % (CHUNK_BYTES // tensor.element_size())
    if not missing:
        return tensor
    pieces = tensor.unflatten(dim, (-1, piece))
    return F.pad(pieces, [0, 0] * (pieces.ndim - dim - 2) + [0, missing]).flatten(dim, dim + 1)


def without_chunks(tensor: Tensor, dim: int, piece: int, whole: int) -> Tensor:
    """What :func:`whole_chunks` put in is left out: the first ``piece`` of each ``whole`` numbers along ``dim``."""
    if piece == whole:
        return tensor
    return tensor.unflatten(dim, (-1, whole)).narrow(dim + 1, 0, piece).flatten(dim, dim + 1)


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where it does not start at 16 bytes."""
    return tensor if tensor.data_ptr() % CHUNK_BYTES == 0 else tensor.clone(memory_format=torch.preserve_format)


def last(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """An image in channels-last layout."""
    return aligned(tensor.to(dtype).contiguous(memory_format=torch.channels_last))
