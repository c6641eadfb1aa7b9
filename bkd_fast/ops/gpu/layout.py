"""Room for results, offsets and masks as kernels read them, and images in parts that kernels can count."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

MOST_PIXELS = 2**30  # that kernels count in 32 bits


def floats(shape: Sequence[int], like: Tensor) -> Tensor:
    """Room for float32 numbers on the device of ``like``."""
    return torch.empty(tuple(shape), dtype=torch.float32, device=like.device)


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
    if offset.shape[0] * each <= MOST_PIXELS:  # a comparison, so that a compiled program keeps for any batch
        if offset.shape[0]:
            yield slice(None)
        return
    step = MOST_PIXELS // each
    for start in range(0, offset.shape[0], step):
        yield slice(start, start + step)
