"""The sampling half of a deformable convolution in Triton: memory is what counts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from bkd_fast.ops.deform_gather import Arguments
from bkd_fast.ops.deterministic import Accumulator, exact_sums, gather_bound
from bkd_fast.ops.layout import dense_offsets, floats, image_slices, to_channels_last, whole_chunks, without_chunks
from bkd_fast.ops.triton_common import Tuned, bucket, config, operator, strides
from bkd_fast.ops.triton_sampling import (
    channel_at,
    chunks,
    modulation,
    place_of,
    sample,
    sampling_position,
    scatter,
    write_offset_grads,
)


@triton.jit
def deform_gather_kernel(
    projected, offset, mask, output,
    pixels, rows, columns, height, width, channels, taps, kernel_taps, kernel_columns,
    stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x,
    offset_image, offset_channel, offset_pixel, mask_image, mask_channel, mask_pixel, problem,
    MASK: tl.constexpr, SHARED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A block of pixels and channels; the sums over all taps stay in registers."""
    channels = chunks(channels, projected.dtype)
    pixel = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid, image, place, row, column = place_of(pixel, pixels, rows, columns)
    base = image * 0 if SHARED else image * (height * width)
    channel = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    within = channel < channels
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tap in range(0, taps):
        to = channel_at(image, place, 2 * tap, offset_image, offset_channel, offset_pixel)
        offset_y = tl.load(offset + to, mask=valid, other=0.0)
        offset_x = tl.load(offset + to + offset_channel, mask=valid, other=0.0)
        top, left, down, right = sampling_position(
            offset_y, offset_x, tap % kernel_taps, kernel_columns, row, column,
            stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x, height, width,
        )  # fmt: skip
        to = channel_at(image, place, tap, mask_image, mask_channel, mask_pixel)
        scale = modulation(mask, to, valid, MASK)
        sums += sample(
            projected + tap * channels, taps * channels, channel, within, top, left, down, right, valid, base,
            height, width, scale,
        )  # fmt: skip
    to = tl.cast(pixel, tl.int64)[:, None] * channels + channel[None, :]
    tl.store(output + to, sums.to(output.dtype.element_ty), mask=valid[:, None] & within[None, :])


@triton.jit
def deform_gather_backward_kernel(
    grad, projected, offset, mask, grad_projected, factor, grad_offset, grad_mask,
    pixels, rows, columns, height, width, channels, taps, kernel_taps, kernel_columns,
    stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x,
    offset_image, offset_channel, offset_pixel, mask_image, mask_channel, mask_pixel, problem,
    MASK: tl.constexpr, SHARED: tl.constexpr, GRAD_INPUT: tl.constexpr, GRAD_OFFSET: tl.constexpr,
    GRAD_MASK: tl.constexpr,
    EXACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A block of pixels and one tap; all channels, BLOCK_N at a time."""
    channels = chunks(channels, projected.dtype)
    pixel = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid, image, place, row, column = place_of(pixel, pixels, rows, columns)
    tap = tl.program_id(1)
    base = image * 0 if SHARED else image * (height * width)
    to = channel_at(image, place, 2 * tap, offset_image, offset_channel, offset_pixel)
    offset_y = tl.load(offset + to, mask=valid, other=0.0)
    offset_x = tl.load(offset + to + offset_channel, mask=valid, other=0.0)
    top, left, down, right = sampling_position(
        offset_y, offset_x, tap % kernel_taps, kernel_columns, row, column,
        stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x, height, width,
    )  # fmt: skip
    to = channel_at(image, place, tap, mask_image, mask_channel, mask_pixel)
    scale = modulation(mask, to, valid, MASK)
    whole = 1.0
    if EXACT:
        whole = tl.load(factor)
    first = tl.zeros((BLOCK_M,), tl.float32)
    second = tl.zeros((BLOCK_M,), tl.float32)
    third = tl.zeros((BLOCK_M,), tl.float32)
    fourth = tl.zeros((BLOCK_M,), tl.float32)
    moving: tl.constexpr = GRAD_OFFSET or GRAD_MASK
    for start in range(0, channels, BLOCK_N):
        channel = start + tl.arange(0, BLOCK_N)
        within = channel < channels
        grad_at = tl.cast(pixel, tl.int64)[:, None] * channels + channel[None, :]
        slopes = tl.load(grad + grad_at, mask=valid[:, None] & within[None, :], other=0.0).to(tl.float32)
        table, sums, stride = projected + tap * channels, grad_projected + tap * channels, taps * channels
        first += scatter(
            slopes, table, sums, whole, stride, channel, within, top, left, down, right, valid, base, height, width,
            scale, 0, 0, GRAD_INPUT, moving, EXACT,
        )  # fmt: skip
        second += scatter(
            slopes, table, sums, whole, stride, channel, within, top, left, down, right, valid, base, height, width,
            scale, 0, 1, GRAD_INPUT, moving, EXACT,
        )  # fmt: skip
        third += scatter(
            slopes, table, sums, whole, stride, channel, within, top, left, down, right, valid, base, height, width,
            scale, 1, 0, GRAD_INPUT, moving, EXACT,
        )  # fmt: skip
        fourth += scatter(
            slopes, table, sums, whole, stride, channel, within, top, left, down, right, valid, base, height, width,
            scale, 1, 1, GRAD_INPUT, moving, EXACT,
        )  # fmt: skip
    if moving:
        write_offset_grads(
            grad_offset, grad_mask, first, second, third, fourth, top, left, down, right, valid, image, place,
            rows * columns, height, width, scale, tap, taps, GRAD_OFFSET, GRAD_MASK,
        )  # fmt: skip


KERNEL = Tuned(
    deform_gather_kernel,
    {
        "any": (
            config(4, BLOCK_M=32, BLOCK_N=64),
            config(4, BLOCK_M=16, BLOCK_N=128),
            config(8, BLOCK_M=32, BLOCK_N=128),
        )
    },
    key=("channels", "taps", "problem"),
)
BACKWARD = Tuned(
    deform_gather_backward_kernel,
    {
        "any": (
            config(4, BLOCK_M=16, BLOCK_N=64),
            config(4, BLOCK_M=32, BLOCK_N=32),
            config(8, BLOCK_M=32, BLOCK_N=64),
        ),
        "exact": (config(8, BLOCK_M=16, BLOCK_N=64),),  # sums of whole numbers: 64 bits each
    },
    key=("channels", "taps", "problem"),
    sums=("grad_projected",),
)


class _Problem:
    """The arguments as the kernels take them."""

    def __init__(self, a: Arguments) -> None:
        dtype = a.projected.dtype
        self.taps = a.offset.shape[1] // 2
        self.channels = a.projected.shape[1] // self.taps
        self.table = to_channels_last(whole_chunks(a.projected, 1, self.channels), dtype)
        self.whole = self.table.shape[1] // self.taps  # channels, with those that only fill chunks
        self.offset = dense_offsets(a.offset, dtype)
        # Without a mask the offset is handed over, and not read.
        self.modulation = self.offset if a.mask is None else dense_offsets(a.mask, dtype)
        self.shared = a.projected.shape[0] == 1
        self.geometry = (*a.kernel_size, *a.stride, *a.padding, *a.dilation)
        self.problem = bucket(a.offset.shape[0] * a.offset.shape[2] * a.offset.shape[3])

    def own(self, images: slice) -> slice:
        """Return the images of the table for images of the offset."""
        return slice(None) if self.shared else images

    def sizes(self, pixels: int) -> tuple[int, ...]:
        """Return all arguments but tensors, in the kernels' order."""
        kernel, *others = self.geometry[0] * self.geometry[1], *self.geometry[1:]
        return (
            pixels, *self.offset.shape[2:], *self.table.shape[2:], self.whole, self.taps, kernel, *others,
            *strides(self.offset), *strides(self.modulation), self.problem,
        )  # fmt: skip


@operator
def modulated_deform_gather(a: Arguments) -> Tensor:
    """See :func:`bkd_fast.ops.modulated_deform_gather`."""
    p = _Problem(a)
    shape = (a.offset.shape[0], p.whole, *a.offset.shape[2:])
    output = torch.empty(shape, dtype=a.projected.dtype, device=a.projected.device, memory_format=torch.channels_last)
    kernel = KERNEL()
    for images in image_slices(a.offset, a.projected):
        part = output[images]
        pixels = part.shape[0] * part.shape[2] * part.shape[3]
        wrap_triton(kernel)[
            lambda meta, pixels=pixels: (
                triton.cdiv(pixels, meta["BLOCK_M"]), triton.cdiv(p.whole, meta["BLOCK_N"]),
            )
        ](
            p.table[p.own(images)], p.offset[images], p.modulation[images], part, *p.sizes(pixels),
            MASK=a.mask is not None, SHARED=p.shared,
        )  # fmt: skip
    return without_chunks(output, 1, p.channels, p.whole)


@operator
def modulated_deform_gather_backward(grad: Tensor, a: Arguments, needs: Sequence[bool]) -> list[Tensor]:
    """Return the gradients with respect to all tensors; empty where ``needs`` is False."""
    p = _Problem(a)
    slopes = to_channels_last(whole_chunks(grad.to(a.projected.dtype), 1, p.channels), a.projected.dtype)
    exact = exact_sums(needs[0])
    grad_table = Accumulator(p.table, needs[0], gather_bound(slopes, a.mask, a.offset, len(p.table)) if exact else None)
    grad_offset = floats(a.offset.shape if needs[1] else (0,), grad)
    grad_mask = floats((0,) if a.mask is None or not needs[2] else a.mask.shape, grad)
    kernel = BACKWARD("exact" if exact else "any")
    for images in image_slices(a.offset, a.projected):
        part = slopes[images]
        pixels = part.shape[0] * part.shape[2] * part.shape[3]
        wrap_triton(kernel)[lambda meta, pixels=pixels: (triton.cdiv(pixels, meta["BLOCK_M"]), p.taps)](
            part, p.table[p.own(images)], p.offset[images], p.modulation[images], grad_table.buffer[p.own(images)],
            slopes if grad_table.scale is None else grad_table.scale, grad_offset[images], grad_mask[images],
            *p.sizes(pixels), MASK=a.mask is not None, SHARED=p.shared, GRAD_INPUT=needs[0], GRAD_OFFSET=needs[1],
            GRAD_MASK=needs[2], EXACT=exact,
        )  # fmt: skip
    total = grad_table.total()
    return [without_chunks(total, 1, p.channels, p.whole) if needs[0] else total, grad_offset, grad_mask]
