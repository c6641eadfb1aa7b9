"""Where many blocks add to one gradient: floats, or whole numbers where the order must not matter."""

from __future__ import annotations

import math

import torch
from torch import Tensor

BITS = 62  # of a sum's magnitude


class Sums:
    """Zeros that kernels add to, channels-last, and what they come to.

    Under ``torch.use_deterministic_algorithms(True)`` they are 64-bit whole numbers times a scale: additions of those
    give the same bits in any order. The scale follows from the largest possible sum, and is found on the device.
    """

    def __init__(self, like: Tensor, needed: bool, bound: Tensor | None = None) -> None:
        """
        Args:
            like: (N, C, H, W), the shape of the gradient.
            needed: without it there are no elements.
            bound: scalar that no sum's magnitude exceeds; None = add floats.
        """
        self.scale: Tensor | None = None
        dtype = torch.float32
        if bound is not None:
            power = torch.exp2((BITS - bound.float().log2().ceil()).clamp(-100, 100))
            # Without a bound no sum is a number.
            self.scale = torch.where(bound.isfinite(), power, torch.full_like(power, math.nan))
            dtype = torch.int64
        shape = like.shape if needed else (0,)
        layout = torch.channels_last if needed else torch.contiguous_format
        self.room = torch.empty(shape, dtype=dtype, device=like.device, memory_format=layout).zero_()

    def total(self) -> Tensor:
        """The sums in float32."""
        if self.scale is None:
            return self.room
        return (self.room.double() / self.scale.double()).float()


def largest(tensor: Tensor | None) -> Tensor | float:
    """The largest magnitude; 1 for None."""
    if tensor is None:
        return 1.0
    return tensor.abs().max().float() if tensor.numel() else tensor.new_zeros((), dtype=torch.float32)


def convolution_bound(grad: Tensor, kernel: Tensor, mask: Tensor | None, offset: Tensor) -> Tensor:
    """What no sum of an input's gradient exceeds: all samples of an image at one pixel.

    Args:
        grad: by the output. kernel: (O, C / groups, kh, kw). mask, offset: of the convolution.
    """
    columns = largest(grad) * kernel.float().abs().sum(0).max()
    return columns * largest(mask) * _finite(offset) * (offset.shape[1] // 2 * offset.shape[2] * offset.shape[3])


def gather_bound(grad: Tensor, mask: Tensor | None, offset: Tensor, images: int) -> Tensor:
    """The same for a table of ``images`` images: each sample reads its own tap's channels."""
    samples = offset[:, 0].numel() if images == 1 else offset.shape[2] * offset.shape[3]
    return largest(grad) * largest(mask) * _finite(offset) * max(samples, 1)


def _finite(offset: Tensor) -> Tensor:
    """1; NaN where an offset is NaN, and with it the gradient of the input."""
    return torch.where(offset.isnan().any(), torch.nan, 1.0)


def exact_sums(needed: bool) -> bool:
    """Whether sums that are needed must not depend on an order."""
    return needed and torch.are_deterministic_algorithms_enabled()
