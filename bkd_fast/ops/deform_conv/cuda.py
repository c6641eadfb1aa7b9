"""Modulated deformable convolution on CUDA kernels (csrc/cuda/deform_conv*.cu)."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

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
    """The arguments as the kernels of tiles take them, and these kernels.

    Channels come in pieces within one group and one offset group; each is filled up to whole 16 bytes.
    """

    def __init__(self, a: Arguments) -> None:
        self.a, self.dtype = a, a.input.dtype
        self.groups = a.input.shape[1] // a.weight.shape[1]
        self.offset_groups = a.offset.shape[1] // (2 * a.weight.shape[2] * a.weight.shape[3])
        self.each = a.weight.shape[0] // self.groups  # outputs of a group
        self.offset = dense_offsets(a.offset, self.dtype)
        self.mask = None if a.mask is None else dense_offsets(a.mask, self.dtype)
        self.arrange()

    def arrange(self) -> None:
        """Fill up input and weights."""
        a = self.a
        self.piece = math.gcd(a.weight.shape[1], a.input.shape[1] // self.offset_groups)
        self.whole = self.piece + -self.piece % (CHUNK_BYTES // a.input.element_size())
        self.input = to_channels_last(whole_chunks(a.input, 1, self.piece), self.dtype)
        self.weight = to_channels_last(whole_chunks(a.weight.to(self.dtype), 1, self.piece), self.dtype)
        # Convolutions ask PyTorch's switch for convolutions.
        self.tf32 = torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]

    def sampled(self, part: slice) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return input, offset and mask of some images."""
        return self.input[part], self.offset[part], None if self.mask is None else self.mask[part]

    def forward(self, part: slice, bias: Tensor | None, output: Tensor) -> None:
        """Write the output of some images."""
        kernels().deform_conv(
            *self.sampled(part), self.weight, bias, *self.geometry(), self.tf32, _wants_wgmma(), output
        )

    def geometry(self) -> tuple[Any, ...]:
        """Return what says where samples are, and of how many offset groups."""
        return self.a.stride, self.a.padding, self.a.dilation, self.offset_groups

    def arrange_grad(self, grad: Tensor) -> None:
        """Fill up the outputs of ``grad`` and of the weights."""
        self.grad = to_channels_last(whole_chunks(grad.to(self.dtype), 1, self.each), self.dtype)
        self.weight = to_channels_last(whole_chunks(self.weight, 0, self.each), self.dtype)

    def backward(self, part: slice, *results: Tensor | None) -> None:
        """Write the gradients by input, offset and mask of some images."""
        kernels().deform_conv_backward(
            self.grad[part], *self.sampled(part), self.weight, *self.geometry(), self.tf32, *results
        )

    def weight_gradient(self, part: slice) -> Tensor:
        """Return the gradient by the weights, of some images."""
        outputs, channels, *size = self.weight.shape
        taps = size[0] * size[1]
        blocks = taps * self.groups * math.ceil(channels / 64) * math.ceil(outputs / self.groups / 128)
        sums = floats((self.parts(part, blocks, 2), outputs, taps, channels), self.weight)
        kernels().deform_conv_weight(self.grad[part], *self.sampled(part), size, *self.geometry(), self.tf32, sums)
        total = _summed(sums).unflatten(1, size).permute(0, 3, 1, 2)
        return without_chunks(without_chunks(total, 0, self.each, outputs // self.groups), 1, self.piece, self.whole)

    def parts(self, part: slice, blocks: int, wanted: int) -> int:
        """Return how many parts of the pixels give each multiprocessor so many blocks, of 256 pixels or more."""
        offset = self.offset[part]
        pixels = offset.shape[0] * offset.shape[2] * offset.shape[3]
        return min(math.ceil(wanted * multiprocessors(self.input) / blocks), math.ceil(pixels / 256))

    def without_filling(self, total: Tensor) -> Tensor:
        """Return the gradient by the input without the channels that were filled up."""
        return without_chunks(total, 1, self.piece, self.whole)


_FEW_CHANNELS = 8  # of a group, and of a thread of the kernels for such groups
_FEW_OUTPUTS = 24  # of such a group; for more, sampling again for every 1 to 8 outputs costs more than empty tiles


class _Few(_Problem):
    """The same for groups of few channels, which are filled up to 1, 2, 4 or 8.

    The groups of an offset group are filled up to whole 8 channels. A round is as many outputs of every group as the
    group has channels.
    """

    def arrange(self) -> None:
        """Fill up input and weights; the order of the weights is (rounds, taps, outputs of a group, channels)."""
        self.channels = self.a.weight.shape[1]
        self.width = 1 << (self.channels - 1).bit_length()
        self.own = self.groups // self.offset_groups  # groups of an offset group
        self.rounds = math.ceil(self.each / self.width)
        self.more_groups, self.more_channels = -self.own % (_FEW_CHANNELS // self.width), self.width - self.channels
        image = self.a.input
        if self.more_groups or self.more_channels:
            split = image.unflatten(1, (self.offset_groups, self.own, self.channels))
            image = F.pad(split, (0, 0, 0, 0, 0, self.more_channels, 0, self.more_groups)).flatten(1, 3)
        self.input = to_channels_last(image, self.dtype)
        weight = self.a.weight.to(self.dtype).reshape(self.offset_groups, self.own, self.each, self.channels, -1)
        more_outputs = self.rounds * self.width - self.each
        weight = F.pad(weight, (0, 0, 0, self.more_channels, 0, more_outputs, 0, self.more_groups))
        weight = weight.unflatten(2, (self.rounds, self.width)).permute(2, 5, 3, 0, 1, 4)
        self.weight = weight.flatten(3).contiguous()

    def forward(self, part: slice, bias: Tensor | None, output: Tensor) -> None:
        """See the base class."""
        kernels().deform_conv_few(*self.sampled(part), self.weight, bias, *self.geometry(), self.groups, output)

    def geometry(self) -> tuple[Any, ...]:
        """See the base class."""
        return list(self.a.weight.shape[2:]), *super().geometry()

    def arrange_grad(self, grad: Tensor) -> None:
        """Fill up the outputs of ``grad``; their order is (rounds, groups, outputs of a round)."""
        grad = grad.to(self.dtype)
        if self.rounds > 1 or self.each < self.width or self.more_groups:
            split = grad.unflatten(1, (self.offset_groups, self.own, self.each))
            more_outputs = self.rounds * self.width - self.each
            grad = F.pad(split, (0, 0, 0, 0, 0, more_outputs, 0, self.more_groups))
            grad = grad.unflatten(3, (self.rounds, self.width)).permute(0, 3, 1, 2, 4, 5, 6).flatten(1, 4)
        self.grad = to_channels_last(grad, self.dtype)

    def backward(self, part: slice, *results: Tensor | None) -> None:
        """See the base class."""
        kernels().deform_conv_few_backward(
            self.grad[part], *self.sampled(part), self.weight, *self.geometry(), self.channels, *results
        )

    def weight_gradient(self, part: slice) -> Tensor:
        """See the base class."""
        blocks = self.rounds * self.weight.shape[1] * math.ceil(self.weight.shape[3] / (32 * _FEW_CHANNELS))
        sums = floats((self.parts(part, blocks, 8), *self.weight.shape), self.weight)
        kernels().deform_conv_few_weight(self.grad[part], *self.sampled(part), *self.geometry(), sums)
        groups = (self.offset_groups, self.own + self.more_groups, self.width)
        total = _summed(sums).unflatten(3, groups).permute(3, 4, 0, 2, 5, 1).flatten(2, 3)
        return total[:, : self.own, : self.each, : self.channels].reshape(self.a.weight.shape)

    def without_filling(self, total: Tensor) -> Tensor:
        """See the base class."""
        if not (self.more_groups or self.more_channels):
            return total
        split = total.unflatten(1, (self.offset_groups, self.own + self.more_groups, self.width))
        return split[:, :, : self.own, : self.channels].flatten(1, 3)


def _problem(a: Arguments) -> _Problem:
    groups = a.input.shape[1] // a.weight.shape[1]
    offset_groups = a.offset.shape[1] // (2 * a.weight.shape[2] * a.weight.shape[3])
    few = a.weight.shape[1] <= _FEW_CHANNELS and a.weight.shape[0] // groups <= _FEW_OUTPUTS
    return _Few(a) if few and groups % offset_groups == 0 else _Problem(a)


def _summed(parts: Tensor) -> Tensor:
    return parts[0] if len(parts) == 1 else parts.sum(0)


def modulated_deform_conv2d(a: Arguments) -> Tensor:
    """See :func:`bkd_fast.ops.modulated_deform_conv2d`."""
    shape = (a.input.shape[0], a.weight.shape[0], *a.offset.shape[2:])
    output = torch.empty(shape, dtype=a.input.dtype, device=a.input.device, memory_format=torch.channels_last)
    bias = None if a.bias is None else a.bias.to(a.input.dtype).contiguous()
    p = _problem(a)
    for part in image_slices(a.offset, a.input):
        p.forward(part, bias, output[part])
    return output


def modulated_deform_conv2d_backward(grad: Tensor, a: Arguments, needs: Sequence[bool]) -> list[Tensor]:
    """Return the gradients with respect to all tensors; empty where ``needs`` is False."""
    p = _problem(a)
    p.arrange_grad(grad)
    bound = convolution_bound(p.grad, a.weight.to(p.dtype), p.mask, a.offset) if exact_sums(needs[0]) else None
    grad_input = Accumulator(p.input, needs[0], bound)
    grad_offset = floats(a.offset.shape if needs[1] else (0,), a.input)
    grad_mask = floats((0,) if a.mask is None or not needs[4] else a.mask.shape, a.input)
    grad_weight: Tensor | None = None
    for part in image_slices(a.offset, a.input):
        if needs[0] or needs[1] or needs[4]:
            buffer = grad_input.buffer[part] if needs[0] else grad_input.buffer
            p.backward(part, buffer, grad_input.scale, grad_offset[part], grad_mask[part])
        if needs[2]:
            own = p.weight_gradient(part)
            grad_weight = own if grad_weight is None else grad_weight + own
    if grad_weight is None:  # not needed, or there are no images
        grad_weight = a.weight.new_zeros(a.weight.shape if needs[2] else (0,), dtype=torch.float32)
    return [
        p.without_filling(grad_input.total()) if needs[0] else grad_input.total(),
        grad_offset,
        grad_weight.contiguous(),
        grad.sum((0, 2, 3), dtype=torch.float32).to(grad.dtype) if needs[3] else grad.new_empty(0),
        grad_mask,
    ]
