"""How kernels want tensors: in whole chunks of 16 bytes, and not too many pixels at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_BYTES = 16
MOST_PIXELS = 2**30  # that kernels count in 32 bits


def floats(shape: Sequence[int], like: Tensor) -> Tensor:
    """Room for float32 numbers on the device of ``like``."""
    return torch.empty(tuple(shape), dtype=torch.float32, device=like.device)


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


def last(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """An image in channels-last layout."""
    return tensor.to(dtype).contiguous(memory_format=torch.channels_last)


def moves(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Offsets or a mask: float32 or the kernel's own type, channels first or last."""
    tensor = tensor if tensor.dtype in (torch.float32, dtype) else tensor.float()
    return tensor if tensor.is_contiguous(memory_format=torch.channels_last) else tensor.contiguous()


def parts(offset: Tensor, image: Tensor) -> Iterator[slice]:
    """Images at a time, so that neither their outputs nor their inputs have more than MOST_PIXELS pixels.

    Raises:
        RuntimeError: one image has more.
    """
    each = max(offset.shape[2] * offset.shape[3], image.shape[2] * image.shape[3], 1)
    if each > MOST_PIXELS:
        raise RuntimeError(f"the GPU kernels take images of up to {MOST_PIXELS} pixels, this one has {each}: use tiles")
    yield from spans(offset.shape[0], MOST_PIXELS // each)


def spans(count: int, most: int) -> Iterator[slice]:
    """At most so many at a time; nothing of none."""
    if count <= most:  # a comparison, so that a compiled program keeps for any number
        if count:
            yield slice(None)
        return
    for start in range(0, count, most):
        yield slice(start, start + most)
