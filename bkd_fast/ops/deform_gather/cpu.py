"""The sampling half of a deformable convolution on CPU kernels (csrc/cpu/deform_conv.cpp)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bkd_fast.ops.cpu_common import (
    dense,
    empty,
    kernels,
    optional,
    product_dtype,
    tier,
    to_channels_last,
    zeros_channels_last,
)
from bkd_fast.ops.deform_gather import Arguments


def modulated_deform_gather(a: Arguments) -> Tensor:
    """See :func:`bkd_fast.ops.modulated_deform_gather`."""
    shape = (a.offset.shape[0], 2 * a.projected.shape[1] // a.offset.shape[1], *a.offset.shape[2:])
    projected = dense(a.projected, torch.channels_last, product_dtype(a.projected))
    output = torch.empty(shape, dtype=projected.dtype, memory_format=torch.channels_last)
    kernels.deform_gather(
        tier(), projected, dense(a.offset), optional(a.mask), a.kernel_size, a.stride, a.padding, a.dilation, output,
    )  # fmt: skip
    return output


def modulated_deform_gather_backward(grad: Tensor, a: Arguments, needs: Sequence[bool]) -> list[Tensor]:
    """Return the gradients with respect to all tensors; empty where ``needs`` is False."""
    grad_projected, grad_offset = zeros_channels_last(a.projected, needs[0]), empty(a.offset, needs[1])
    grad_mask = empty(grad if a.mask is None else a.mask, needs[2])
    kernels.deform_gather_backward(
        tier(), to_channels_last(grad), to_channels_last(a.projected), dense(a.offset), optional(a.mask),
        a.kernel_size, a.stride, a.padding, a.dilation, grad_projected, grad_offset, grad_mask,
    )  # fmt: skip
    return [grad_projected, grad_offset, grad_mask]
