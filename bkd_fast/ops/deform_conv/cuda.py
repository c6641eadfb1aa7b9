"""Modulated deformable convolution on CUDA kernels (csrc/cuda/deform_conv*.cu)."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bkd_fast.ops.cuda_common import kernels, multiprocessors, to_channels_last
from bkd_fast.ops.deform_conv import Arguments
from bkd_fast.ops.deterministic import Accumulator, convolution_bound, exact_sums
from bkd_fast.ops.layout import CHUNK_BYTES, dense_offsets, floats, image_slices, whole_chunks, without_chunks

WGMMA = "BKD_FAST_WGMMA"

_wgmma: ContextVar[bool | None] = ContextVar("bkd_fast_wgmma", default=None)


@contextmanager
def wgmma(on: bool) -> Iterator[None]:
    """Let large products in half precision run on ``wgmma`` inside the ``with`` block, or not.

    Without it the environment variable BKD_FAST_WGMMA decides (0 or 1; 0 without it). Devices that lack ``wgmma``, or
    code for it (see :func:`has_wgmma`), run on ``mma.sync`` whatever is chosen.
    """
    token = _wgmma.set(on)
    try:
        yield
    finally:
        _wgmma.reset(token)


def has_wgmma(tensor: Tensor) -> bool:
    """Return whether a tensor's device has ``wgmma``, and the extension code for it (compute capability 9.0a)."""
    return bool(kernels().deform_conv_has_wgmma(tensor))


def _wants_wgmma() -> bool:
    chosen = _wgmma.get()
    if chosen is not None:
        return chosen
    value = os.environ.get(WGMMA) or "0"
    if value not in ("0", "1"):
        raise RuntimeError(f"bkd_fast: {WGMMA} is {value!r}, expected 0 or 1")
    return value == "1"


class _Problem:
    """The arguments as the kernels take them.

    Channels come in pieces within one group and one offset group; each is filled up to whole 16 bytes.
    """

    def __init__(self, a: Arguments) -> None:
        dtype = a.input.dtype
        self.groups = a.input.shape[1] // a.weight.shape[1]
        self.offset_groups = a.offset.shape[1] // (2 * a.weight.shape[2] * a.weight.shape[3])
        self.piece = math.gcd(a.weight.shape[1], a.input.shape[1] // self.offset_groups)
        self.whole = self.piece + -self.piece % (CHUNK_BYTES // a.input.element_size())
        self.input = to_channels_last(whole_chunks(a.input, 1, self.piece), dtype)
        self.weight = to_channels_last(whole_chunks(a.weight.to(dtype), 1, self.piece), dtype)
        self.offset = dense_offsets(a.offset, dtype)
        self.mask = None if a.mask is None else dense_offsets(a.mask, dtype)
        # Convolutions ask PyTorch's switch for convolutions.
        self.tf32 = torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]


_FEW_CHANNELS = 8  # of a group, and of a thread of the kernel for such groups
_FEW_OUTPUTS = 24  # of such a group; for more, sampling again for every 1 to 8 outputs costs more than empty tiles


def modulated_deform_conv2d(a: Arguments) -> Tensor:
    """See :func:`bkd_fast.ops.modulated_deform_conv2d`."""
    shape = (a.input.shape[0], a.weight.shape[0], *a.offset.shape[2:])
    output = torch.empty(shape, dtype=a.input.dtype, device=a.input.device, memory_format=torch.channels_last)
    bias = None if a.bias is None else a.bias.to(a.input.dtype).contiguous()
    groups = a.input.shape[1] // a.weight.shape[1]
    offset_groups = a.offset.shape[1] // (2 * a.weight.shape[2] * a.weight.shape[3])
    few = a.weight.shape[1] <= _FEW_CHANNELS and a.weight.shape[0] // groups <= _FEW_OUTPUTS
    if few and groups % offset_groups == 0:
        _few_channels(a, groups, offset_groups, bias, output)
        return output
    p = _Problem(a)
    for part in image_slices(a.offset, a.input):
        kernels().deform_conv(
            p.input[part], p.offset[part], None if p.mask is None else p.mask[part], p.weight, bias, a.stride,
            a.padding, a.dilation, p.offset_groups, p.tf32, _wants_wgmma(), output[part],
        )  # fmt: skip
    return output


def _few_channels(a: Arguments, groups: int, offset_groups: int, bias: Tensor | None, output: Tensor) -> None:
    """Forward for groups of few channels, which are filled up to 1, 2, 4 or 8.

    The groups of an offset group are filled up to whole 8 channels. The kernel takes as many outputs of a group at a
    time as the group has channels.
    """
    dtype, (outputs, channels, *kernel) = a.input.dtype, a.weight.shape
    width = 1 << (channels - 1).bit_length()
    own, each = groups // offset_groups, outputs // groups  # groups of an offset group, outputs of a group
    rounds = math.ceil(each / width)
    more_groups, more_channels = -own % (_FEW_CHANNELS // width), width - channels
    image = a.input
    if more_groups or more_channels:
        split = image.unflatten(1, (offset_groups, own, channels))
        image = F.pad(split, (0, 0, 0, 0, 0, more_channels, 0, more_groups)).flatten(1, 3)
    image = to_channels_last(image, dtype)
    weight = a.weight.to(dtype).reshape(offset_groups, own, each, channels, -1)
    weight = F.pad(weight, (0, 0, 0, more_channels, 0, rounds * width - each, 0, more_groups))
    # (offset groups, chunks, groups of a chunk, rounds, outputs, channels, taps)
    weight = weight.reshape(offset_groups, -1, _FEW_CHANNELS // width, rounds, width, width, weight.shape[-1])
    weight = weight.permute(3, 6, 0, 1, 2, 4, 5).reshape(rounds, weight.shape[-1], -1, _FEW_CHANNELS, width)
    offset, mask = dense_offsets(a.offset, dtype), None if a.mask is None else dense_offsets(a.mask, dtype)
    for part in image_slices(a.offset, a.input):
        kernels().deform_conv_few(
            image[part], offset[part], None if mask is None else mask[part], weight.contiguous(), bias, kernel,
            a.stride, a.padding, a.dilation, offset_groups, groups, output[part],
        )  # fmt: skip


def modulated_deform_conv2d_backward(grad: Tensor, a: Arguments, needs: Sequence[bool]) -> list[Tensor]:
    """Return the gradients with respect to all tensors; empty where ``needs`` is False."""
    p = _Problem(a)
    each = a.weight.shape[0] // p.groups
    grad_output = to_channels_last(whole_chunks(grad.to(a.input.dtype), 1, each), a.input.dtype)
    kernel = to_channels_last(whole_chunks(p.weight, 0, each), a.input.dtype)
    bound = convolution_bound(grad_output, kernel, p.mask, a.offset) if exact_sums(needs[0]) else None
    grad_input = Accumulator(p.input, needs[0], bound)
    grad_offset = floats(a.offset.shape if needs[1] else (0,), a.input)
    grad_mask = floats((0,) if a.mask is None or not needs[4] else a.mask.shape, a.input)
    grad_kernel: Tensor | None = None
    for part in image_slices(a.offset, a.input):
        shared = (grad_output[part], p.input[part], p.offset[part], None if p.mask is None else p.mask[part])
        if needs[0] or needs[1] or needs[4]:
            kernels().deform_conv_backward(
                *shared, kernel, a.stride, a.padding, a.dilation, p.offset_groups, p.tf32,
                grad_input.buffer[part] if needs[0] else grad_input.buffer, grad_input.scale, grad_offset[part],
                grad_mask[part],
            )  # fmt: skip
        if needs[2]:
            own = _grad_weight(shared, kernel, a, p)
            grad_kernel = own if grad_kernel is None else grad_kernel + own
    if grad_kernel is None:  # not needed, or there are no images
        grad_kernel = kernel.new_zeros(kernel.shape if needs[2] else (0,), dtype=torch.float32)
    if needs[2]:
        outputs = kernel.shape[0] // p.groups
        grad_kernel = without_chunks(without_chunks(grad_kernel, 0, each, outputs), 1, p.piece, p.whole)
    return [
        without_chunks(grad_input.total(), 1, p.piece, p.whole) if needs[0] else grad_input.total(),
        grad_offset,
        grad_kernel,
        grad.sum((0, 2, 3), dtype=torch.float32).to(grad.dtype) if needs[3] else grad.new_empty(0),
        grad_mask,
    ]


def _grad_weight(
    shared: tuple[Tensor, Tensor, Tensor, Tensor | None], kernel: Tensor, a: Arguments, p: _Problem
) -> Tensor:
    """Return the gradient of some images, shaped as the kernel. Pixels are split over all multiprocessors."""
    outputs, channels, *size = kernel.shape
    taps, pixels = size[0] * size[1], shared[2].shape[0] * shared[2].shape[2] * shared[2].shape[3]
    blocks = taps * p.groups * math.ceil(channels / 64) * math.ceil(outputs / p.groups / 128)
    count = min(math.ceil(2 * multiprocessors(kernel) / blocks), math.ceil(pixels / 256))
    sums = floats((count, outputs, taps, channels), kernel)
    kernels().deform_conv_weight(*shared, size, a.stride, a.padding, a.dilation, p.offset_groups, p.tf32, sums)
    total = sums[0] if count == 1 else sums.sum(0)
    return total.unflatten(1, size).permute(0, 3, 1, 2).contiguous()
