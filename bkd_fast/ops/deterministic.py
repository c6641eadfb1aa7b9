"""Gradients that many blocks add to: in floats, or in integers where the order must not matter."""

from __future__ import annotations

import math

import torch
from torch import Tensor

BITS = 62  # of a sum's magnitude


class Accumulator:
    """A channels-last buffer of zeros that kernels add to.

    Under ``torch.use_deterministic_algorithms(True)`` it holds 64-bit integers times a scale: their sums have the
    same bits in any order. The scale follows from the largest possible sum, and is computed on the device.
    """

    def __init__(self, like: Tensor, needed: bool, bound: Tensor | None = None) -> None:
        """Allocate the buffer.

        Args:
            like: (N, C, H, W), the shape of the gradient.
            needed: if False there are no elements.
            bound: scalar, the largest possible magnitude of a sum; None = add floats.
        """
        self.scale: Tensor | None = None
        dtype = torch.float32
        if bound is not None:
            power = torch.exp2((BITS - bound.float().log2().ceil()).clamp(-100, 100))
            # Without a finite bound every sum is NaN.
            self.scale = torch.where(bound.isfinite(), power, torch.full_like(power, math.nan))
            dtype = torch.int64
        shape = like.shape if needed else (0,)
        layout = torch.channels_last if needed else torch.contiguous_format
        self.buffer = torch.empty(shape, dtype=dtype, device=like.device, memory_format=layout).zero_()

    def total(self) -> Tensor:
        """Return the sums in float32."""
        if self.scale is None:
            return self.buffer
        return (self.buffer.double() / self.scale.double()).float()


def largest(tensor: Tensor | None) -> Tensor | float:
    """Return the largest magnitude; 1 for None."""
    if tensor is None:
        return 1.0
    return tensor.abs().max().float() if tensor.numel() else tensor.new_zeros((), dtype=torch.float32)


def convolution_bound(grad: Tensor, kernel: Tensor, mask: Tensor | None, offset: Tensor) -> Tensor:
    """Return a bound on the sums of an input's gradient: all samples of an image at one pixel.

    Args:
        grad: with respect to the output. kernel: (O, C / groups, kh, kw). mask, offset: of the convolution.
    """
    columns = largest(grad) * kernel.float().abs().sum(0).max()
    return columns * largest(mask) * _finite(offset) * (offset.shape[1] // 2 * offset.shape[2] * offset.shape[3])


def gather_bound(grad: Tensor, mask: Tensor | None, offset: Tensor, images: int) -> Tensor:
    """Return the same for a table of ``images`` images: each sample reads the channels of one tap."""
    samples = offset[:, 0].numel() if images == 1 else offset.shape[2] * offset.shape[3]
    return largest(grad) * largest(mask) * _finite(offset) * max(samples, 1)


def _finite(offset: Tensor) -> Tensor:
    """1; NaN where an offset is NaN, and with it the gradient of the input."""
    return torch.where(offset.isnan().any(), torch.nan, 1.0)


def exact_sums(needed: bool) -> bool:
    """Return whether sums are needed and must not depend on an order."""
    return needed and torch.are_deterministic_algorithms_enabled()
