"""Modulated deformable convolution on CPU kernels (csrc/cpu/deform_conv.cpp)."""

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
from bkd_fast.ops.deform_conv import Arguments
from bkd_fast.ops.registration import memory_format, wide

IMAGE_BYTES = 3 * 2**20  # of input that is converted to channels-last at a time, for each thread


def modulated_deform_conv2d(a: Arguments) -> Tensor:
    """See :func:`bkd_fast.ops.modulated_deform_conv2d`."""
    shape = (a.input.shape[0], a.weight.shape[0], *a.offset.shape[2:])
    dtype = product_dtype(a.input, a.weight)
    output = torch.empty(shape, dtype=dtype, memory_format=memory_format(a.input))
    weight, bias = dense(a.weight, dtype=dtype), optional(a.bias)
    # A channels-last input is read in place; others are converted part after part, in one buffer.
    image = max(1, a.input[:1].numel() * output.element_size())
    converted = dtype != a.input.dtype or memory_format(a.input) != torch.channels_last
    step = max(1, IMAGE_BYTES * torch.get_num_threads() // image if converted else shape[0])
    held = (min(step, shape[0]) if converted else 0, *a.input.shape[1:])
    buffer = torch.empty(held, dtype=dtype, memory_format=torch.channels_last)
    for start in range(0, shape[0], step):
        part = slice(start, start + step)
        images = a.input[part]
        if converted:
            images = buffer[: len(images)].copy_(images)
        kernels.deform_conv(
            tier(), images, dense(a.offset[part]), None if a.mask is None else dense(a.mask[part]), weight, bias,
            a.stride, a.padding, a.dilation, output[part],
        )  # fmt: skip
    return output


def modulated_deform_conv2d_backward(grad: Tensor, a: Arguments, needs: Sequence[bool]) -> list[Tensor]:
    """Return the gradients with respect to all tensors; empty where ``needs`` is False."""
    grad_input = zeros_channels_last(a.input, needs[0])
    grad_offset, grad_weight = empty(a.offset, needs[1]), empty(a.weight, needs[2])
    grad_mask = empty(grad if a.mask is None else a.mask, needs[4])
    if needs[0] or needs[1] or needs[2] or needs[4]:
        kernels.deform_conv_backward(
            tier(), dense(grad, memory_format(grad)), to_channels_last(a.input), dense(a.offset), optional(a.mask),
            dense(a.weight), a.stride, a.padding, a.dilation, grad_input, grad_offset, grad_mask, grad_weight,
        )  # fmt: skip
    grad_bias = grad.sum((0, 2, 3), dtype=wide(grad)).to(grad.dtype) if needs[3] else grad.new_empty(0)
    return [grad_input, grad_offset, grad_weight, grad_bias, grad_mask]
