"""The layout of tensors for GPU kernels: whole chunks of 16 bytes, and a limited number of pixels at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_BYTES = 16
MAX_PIXELS = 2**30  # counted in 32 bits


def floats(shape: Sequence[int], like: Tensor) -> Tensor:
    """Return a float32 buffer on the device of ``like``."""
    return torch.empty(tuple(shape), dtype=torch.float32, device=like.device)


def whole_chunks(tensor: Tensor, dim: int, piece: int) -> Tensor:
    """Pad each ``piece`` numbers along ``dim`` with zeros to whole 16 bytes; return the tensor itself if they are."""
    missing = -piece % (CHUNK_BYTES // tensor.element_size())
    if not missing:
        return tensor
    pieces = tensor.unflatten(dim, (-1, piece))
    return F.pad(pieces, [0, 0] * (pieces.ndim - dim - 2) + [0, missing]).flatten(dim, dim + 1)


def without_chunks(tensor: Tensor, dim: int, piece: int, whole: int) -> Tensor:
    """Undo :func:`whole_chunks`: return the first ``piece`` of each ``whole`` numbers along ``dim``."""
    if piece == whole:
        return tensor
    return tensor.unflatten(dim, (-1, whole)).narrow(dim + 1, 0, piece).flatten(dim, dim + 1)


def to_channels_last(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return an image in channels-last layout."""
    return tensor.to(dtype).contiguous(memory_format=torch.channels_last)


def dense_offsets(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return offsets or a mask in float32 or the kernel's dtype, channels first or last."""
    tensor = tensor if tensor.dtype in (torch.float32, dtype) else tensor.float()
    return tensor if tensor.is_contiguous(memory_format=torch.channels_last) else tensor.contiguous()


def image_slices(offset: Tensor, image: Tensor) -> Iterator[slice]:
    """Yield slices of images whose outputs and inputs have at most MAX_PIXELS pixels.

    Raises:
        RuntimeError: one image has more.
    """
    each = max(offset.shape[2] * offset.shape[3], image.shape[2] * image.shape[3], 1)
    if each > MAX_PIXELS:
        raise RuntimeError(f"the GPU kernels take images of up to {MAX_PIXELS} pixels, this one has {each}: use tiles")
    yield from spans(offset.shape[0], MAX_PIXELS // each)


def spans(count: int, max_count: int) -> Iterator[slice]:
    """Yield slices of at most ``max_count``; none if there is nothing to slice."""
    if count <= max_count:  # a comparison, so that a compiled program keeps for any number
        if count:
            yield slice(None)
        return
    for start in range(0, count, max_count):
        yield slice(start, start + max_count)
