"""Modulated deformable convolution on CUDA kernels (csrc/cuda/deform_conv*.cu)."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
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


def modulated_deform_conv2d(a: Arguments) -> Tensor:
    """See :func:`bkd_fast.ops.modulated_deform_conv2d`."""
    p = _Problem(a)
    shape = (a.input.shape[0], a.weight.shape[0], *a.offset.shape[2:])
    output = torch.empty(shape, dtype=a.input.dtype, device=a.input.device, memory_format=torch.channels_last)
    bias = None if a.bias is None else a.bias.to(a.input.dtype).contiguous()
    for part in image_slices(a.offset, a.input):
        kernels().deform_conv(
            p.input[part], p.offset[part], None if p.mask is None else p.mask[part], p.weight, bias, a.stride,
            a.padding, a.dilation, p.offset_groups, p.tf32, _wants_wgmma(), output[part],
        )  # fmt: skip
    return output


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
