"""The sampling half of a deformable convolution in Triton: memory is what counts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from bkd_fast.ops.deform_conv import GATHER_BACKWARD_SCHEMA, GATHER_SCHEMA
from bkd_fast.ops.gpu.layout import floats, last, moves, parts, whole_chunks, without_chunks
from bkd_fast.ops.gpu.sums import Sums, exact_sums, gather_bound
from bkd_fast.ops.triton.launching import Tuned, bucket, config, operator, strides
from bkd_fast.ops.triton.sampling import channel_at, chunks, modulation, place_of, sample, scatter, spot, write_moves


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
        move_y = tl.load(offset + to, mask=valid, other=0.0)
        move_x = tl.load(offset + to + offset_channel, mask=valid, other=0.0)
        top, left, down, right = spot(
            move_y, move_x, tap % kernel_taps, kernel_columns, row, column,
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
    grad, projected, offset, mask, by_projected, factor, by_offset, by_mask,
    pixels, rows, columns, height, width, channels, taps, kernel_taps, kernel_columns,
    stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x,
    offset_image, offset_channel, offset_pixel, mask_image, mask_channel, mask_pixel, problem,
    MASK: tl.constexpr, SHARED: tl.constexpr, BY_INPUT: tl.constexpr, BY_OFFSET: tl.constexpr, BY_MASK: tl.constexpr,
    EXACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A block of pixels and one tap; all channels, BLOCK_N at a time."""
    channels = chunks(channels, projected.dtype)
    pixel = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid, image, place, row, column = place_of(pixel, pixels, rows, columns)
    tap = tl.program_id(1)
    base = image * 0 if SHARED else image * (height * width)
    to = channel_at(image, place, 2 * tap, offset_image, offset_channel, offset_pixel)
    move_y = tl.load(offset + to, mask=valid, other=0.0)
    move_x = tl.load(offset + to + offset_channel, mask=valid, other=0.0)
    top, left, down, right = spot(
        move_y, move_x, tap % kernel_taps, kernel_columns, row, column,
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
    moving: tl.constexpr = BY_OFFSET or BY_MASK
    for start in range(0, channels, BLOCK_N):
        channel = start + tl.arange(0, BLOCK_N)
        within = channel < channels
        grad_at = tl.cast(pixel, tl.int64)[:, None] * channels + channel[None, :]
        slopes = tl.load(grad + grad_at, mask=valid[:, None] & within[None, :], other=0.0).to(tl.float32)
        table, sums, stride = projected + tap * channels, by_projected + tap * channels, taps * channels
        first += scatter(
            slopes, table, sums, whole, stride, channel, within, top, left, down, right, valid, base, height, width,
            scale, 0, 0, BY_INPUT, moving, EXACT,
        )  # fmt: skip
        second += scatter(
            slopes, table, sums, whole, stride, channel, within, top, left, down, right, valid, base, height, width,
            scale, 0, 1, BY_INPUT, moving, EXACT,
        )  # fmt: skip
        third += scatter(
            slopes, table, sums, whole, stride, channel, within, top, left, down, right, valid, base, height, width,
            scale, 1, 0, BY_INPUT, moving, EXACT,
        )  # fmt: skip
        fourth += scatter(
            slopes, table, sums, whole, stride, channel, within, top, left, down, right, valid, base, height, width,
            scale, 1, 1, BY_INPUT, moving, EXACT,
        )  # fmt: skip
    if moving:
        write_moves(
            by_offset, by_mask, first, second, third, fourth, top, left, down, right, valid, image, place,
            rows * columns, height, width, scale, tap, taps, BY_OFFSET, BY_MASK,
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
    sums=("by_projected",),
)


class _Problem:
    """The arguments as the kernels take them."""

    def __init__(self, projected: Tensor, offset: Tensor, mask: Tensor | None, geometry: Sequence[int]) -> None:
        self.taps = offset.shape[1] // 2
        self.channels = projected.shape[1] // self.taps
        self.table = last(whole_chunks(projected, 1, self.channels), projected.dtype)
        self.whole = self.table.shape[1] // self.taps  # channels, with those that only fill chunks
        self.offset = moves(offset, projected.dtype)
        # Without a mask the offset is handed over, and not read.
        self.modulation = self.offset if mask is None else moves(mask, projected.dtype)
        self.shared = projected.shape[0] == 1
        self.geometry = geometry
        self.problem = bucket(offset.shape[0] * offset.shape[2] * offset.shape[3])

    def own(self, images: slice) -> slice:
        """The images of the table that belong to images of the offset."""
        return slice(None) if self.shared else images

    def sizes(self, pixels: int) -> tuple[int, ...]:
        """All that is no tensor, in the kernels' order."""
        kernel, *others = self.geometry[0] * self.geometry[1], *self.geometry[1:]
        return (
            pixels, *self.offset.shape[2:], *self.table.shape[2:], self.whole, self.taps, kernel, *others,
            *strides(self.offset), *strides(self.modulation), self.problem,
        )  # fmt: skip


@operator(GATHER_SCHEMA)
def modulated_deform_gather(
    projected: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """See :func:`bkd_fast.ops.modulated_deform_gather`."""
    p = _Problem(projected, offset, mask, (*kernel_size, *stride, *padding, *dilation))
    shape = (offset.shape[0], p.whole, *offset.shape[2:])
    output = torch.empty(shape, dtype=projected.dtype, device=projected.device, memory_format=torch.channels_last)
    kernel = KERNEL()
    for images in parts(offset, projected):
        found = output[images]
        pixels = found.shape[0] * found.shape[2] * found.shape[3]
        wrap_triton(kernel)[
            lambda meta, pixels=pixels: (
                triton.cdiv(pixels, meta["BLOCK_M"]), triton.cdiv(p.whole, meta["BLOCK_N"]),
            )
        ](
            p.table[p.own(images)], p.offset[images], p.modulation[images], found, *p.sizes(pixels),
            MASK=mask is not None, SHARED=p.shared,
        )  # fmt: skip
    return without_chunks(output, 1, p.channels, p.whole)


@operator(GATHER_BACKWARD_SCHEMA)
def modulated_deform_gather_backward(
    grad: Tensor,
    projected: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by projected, offset and mask; empty tensors where ``needs`` says so."""
    p = _Problem(projected, offset, mask, (*kernel_size, *stride, *padding, *dilation))
    slopes = last(whole_chunks(grad.to(projected.dtype), 1, p.channels), projected.dtype)
    exact = exact_sums(needs[0])
    by_table = Sums(p.table, needs[0], gather_bound(slopes, mask, offset, len(p.table)) if exact else None)
    by_offset = floats(offset.shape if needs[1] else (0,), grad)
    by_mask = floats((0,) if mask is None or not needs[2] else mask.shape, grad)
    kernel = BACKWARD("exact" if exact else "any")
    for images in parts(offset, projected):
        part = slopes[images]
        pixels = part.shape[0] * part.shape[2] * part.shape[3]
        wrap_triton(kernel)[lambda meta, pixels=pixels: (triton.cdiv(pixels, meta["BLOCK_M"]), p.taps)](
            part, p.table[p.own(images)], p.offset[images], p.modulation[images], by_table.room[p.own(images)],
            slopes if by_table.scale is None else by_table.scale, by_offset[images], by_mask[images],
            *p.sizes(pixels), MASK=mask is not None, SHARED=p.shared, BY_INPUT=needs[0], BY_OFFSET=needs[1],
            BY_MASK=needs[2], EXACT=exact,
        )  # fmt: skip
    found = by_table.total()
    if needs[0]:
        found = without_chunks(found, 1, p.channels, p.whole)
    like = grad if mask is None else mask
    return found.to(projected.dtype), by_offset.to(offset.dtype), by_mask.to(like.dtype)
