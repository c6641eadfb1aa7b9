"""Modulated deformable convolution on CUDA kernels (csrc/cuda/deform_conv*.cu)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bkd_fast.ops.gpu.layout import CHUNK_BYTES, floats, moves, parts, whole_chunks, without_chunks
from bkd_fast.ops.gpu.sums import Sums, convolution_bound, exact_sums
from bkd_fast.ops.native.cuda.layout import kernels, last, processors


class _Problem:
    """The arguments as the kernels take them.

    Channels come in pieces that lie within one group and one offset group; each is filled up to whole 16 bytes.
    """

    def __init__(self, input: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None) -> None:
        dtype = input.dtype
        self.groups = input.shape[1] // weight.shape[1]
        self.offset_groups = offset.shape[1] // (2 * weight.shape[2] * weight.shape[3])
        self.piece = math.gcd(weight.shape[1], input.shape[1] // self.offset_groups)
        self.whole = self.piece + -self.piece % (CHUNK_BYTES // input.element_size())
        self.input = last(whole_chunks(input, 1, self.piece), dtype)
        self.weight = last(whole_chunks(weight.to(dtype), 1, self.piece), dtype)
        self.offset = moves(offset, dtype)
        self.mask = None if mask is None else moves(mask, dtype)
        # Convolutions ask PyTorch's switch for convolutions.
        self.tf32 = torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]


def modulated_deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    mask: Tensor | None,
) -> Tensor:
    """See :func:`bkd_fast.ops.modulated_deform_conv2d`."""
    p = _Problem(input, offset, weight, mask)
    shape = (input.shape[0], weight.shape[0], *offset.shape[2:])
    output = torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=torch.channels_last)
    shift = None if bias is None else bias.to(input.dtype).contiguous()
    for part in parts(offset, input):
        kernels().deform_conv(
            p.input[part], p.offset[part], None if p.mask is None else p.mask[part], p.weight, shift, stride, padding,
            dilation, p.offset_groups, p.tf32, output[part],
        )  # fmt: skip
    return output


def modulated_deform_conv2d_backward(
    grad: Tensor,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients by input, offset, weight, bias and mask; empty tensors where ``needs`` says so."""
    p = _Problem(input, offset, weight, mask)
    each = weight.shape[0] // p.groups
    by_output = last(whole_chunks(grad.to(input.dtype), 1, each), input.dtype)
    kernel = last(whole_chunks(p.weight, 0, each), input.dtype)
    bound = convolution_bound(by_output, kernel, p.mask, offset) if exact_sums(needs[0]) else None
    by_input = Sums(p.input, needs[0], bound)
    by_offset = floats(offset.shape if needs[1] else (0,), input)
    by_mask = floats((0,) if mask is None or not needs[4] else mask.shape, input)
    by_kernel = torch.zeros(kernel.shape if needs[2] else (0,), dtype=torch.float32, device=input.device)
    for part in parts(offset, input):
        shared = (by_output[part], p.input[part], p.offset[part], None if p.mask is None else p.mask[part])
        if needs[0] or needs[1] or needs[4]:
            kernels().deform_conv_backward(
                *shared, kernel, stride, padding, dilation, p.offset_groups, p.tf32,
                by_input.room[part] if needs[0] else by_input.room, by_input.scale, by_offset[part], by_mask[part],
            )  # fmt: skip
        if needs[2]:
            by_kernel += _by_weight(shared, kernel, stride, padding, dilation, p)
    found = without_chunks(by_input.total(), 1, p.piece, p.whole) if needs[0] else by_input.total()
    if needs[2]:
        by_kernel = without_chunks(without_chunks(by_kernel, 0, each, kernel.shape[0] // p.groups), 1, p.piece, p.whole)
    like = grad if mask is None else mask
    return (
        found.to(input.dtype),
        by_offset.to(offset.dtype),
        by_kernel.to(weight.dtype),
        grad.sum((0, 2, 3), dtype=torch.float32).to(grad.dtype) if needs[3] else grad.new_empty(0),
        by_mask.to(like.dtype),
    )


def _by_weight(
    shared: tuple[Tensor, Tensor, Tensor, Tensor | None],
    kernel: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    p: _Problem,
) -> Tensor:
    """The gradient of some images, shaped as the kernel. The pixels are split so that every processor has work."""
    outputs, channels, *size = kernel.shape
    taps, pixels = size[0] * size[1], shared[2].shape[0] * shared[2].shape[2] * shared[2].shape[3]
    blocks = taps * p.groups * math.ceil(channels / 64) * math.ceil(outputs / p.groups / 128)
    count = min(math.ceil(2 * processors(kernel) / blocks), math.ceil(pixels / 256))
    sums = floats((count, outputs, taps, channels), kernel)
    kernels().deform_conv_weight(*shared, size, stride, padding, dilation, p.offset_groups, p.tf32, sums)
    return sums.sum(0).unflatten(1, size).permute(0, 3, 1, 2)
