"""Modulated deformable convolution as an implicit GEMM in Triton: samples go from registers to the tensor cores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from bkd_fast.ops.cuda_common import multiprocessors
from bkd_fast.ops.deform_conv import Arguments
from bkd_fast.ops.deterministic import Accumulator, convolution_bound, exact_sums
from bkd_fast.ops.layout import dense_offsets, floats, image_slices, to_channels_last, whole_chunks, without_chunks
from bkd_fast.ops.triton_common import Tuned, bucket, config, kind_of, operator, strides
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

SMALL = 64  # pixels of the small tiles, and outputs of the smallest
MIN_DEPTH = 128  # of a part
UNIT = tl.constexpr(32)  # channels; parts of the depth begin at whole units


@triton.jit
def in_chunks(channels, outputs, group_channels, group_outputs, offset_channels, piece, like: tl.constexpr):
    """The numbers of channels, which the compiler then knows to be whole chunks."""
    return (
        chunks(channels, like), chunks(outputs, like), chunks(group_channels, like), chunks(group_outputs, like),
        chunks(offset_channels, like), chunks(piece, like),
    )  # fmt: skip


@triton.jit
def deform_conv_kernel(
    input, offset, mask, weight, bias, output,
    pixels, rows, columns, height, width, channels, outputs, group_channels, group_outputs, offset_channels, piece,
    taps, kernel_columns, stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x,
    offset_image, offset_channel, offset_pixel, mask_image, mask_channel, mask_pixel, problem,
    MASK: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A block of pixels times a block of one group's outputs.

    The depth of the product is ``piece`` channels of one group and one offset group at a time, tap after tap, so that a
    pixel's four neighbours and their weights are worked out once for all of a piece's channels.

    SPLIT: over a part of the depth alone; ``output`` is then (parts, pixels, outputs). Parts begin at whole UNITs of a
    piece, wherever that is within a tap, so that no tile moves a number from one part to another.
    """
    channels, outputs, group_channels, group_outputs, offset_channels, piece = in_chunks(
        channels, outputs, group_channels, group_outputs, offset_channels, piece, input.dtype
    )
    pixel = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid, image, place, row, column = place_of(pixel, pixels, rows, columns)
    tiles = tl.cdiv(group_outputs, BLOCK_N)
    group = tl.program_id(1) // tiles
    within_group = tl.program_id(1) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    own = within_group < group_outputs
    out = group * group_outputs + within_group
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first_step, last_step = 0, group_channels // piece * taps
    if SPLIT:
        tl.static_assert(UNIT % BLOCK_K == 0)
        units = tl.cdiv(piece, UNIT)
        all_units = (last_step * units).to(tl.int64)
        first_unit = (all_units * tl.program_id(2) // tl.num_programs(2)).to(tl.int32)
        last_unit = (all_units * (tl.program_id(2) + 1) // tl.num_programs(2)).to(tl.int32)
        first_step, last_step = first_unit // units, tl.cdiv(last_unit, units)
    for step in range(first_step, last_step):
        tap = step % taps
        first = group * group_channels + step // taps * piece
        slot = first // offset_channels * taps + tap
        to = channel_at(image, place, 2 * slot, offset_image, offset_channel, offset_pixel)
        offset_y = tl.load(offset + to, mask=valid, other=0.0)
        offset_x = tl.load(offset + to + offset_channel, mask=valid, other=0.0)
        top, left, down, right = sampling_position(
            offset_y, offset_x, tap, kernel_columns, row, column,
            stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x, height, width,
        )  # fmt: skip
        to = channel_at(image, place, slot, mask_image, mask_channel, mask_pixel)
        scale = modulation(mask, to, valid, MASK)
        line = (tl.cast(out, tl.int64) * taps + tap) * group_channels + step // taps * piece
        begin, end = 0, piece
        if SPLIT:
            begin = tl.maximum(first_unit - step * units, 0) * UNIT
            end = tl.minimum((last_unit - step * units) * UNIT, piece)
        for start in range(begin, end, BLOCK_K):
            channel = start + tl.arange(0, BLOCK_K)
            within = channel < piece
            samples = sample(
                input + first, channels, channel, within, top, left, down, right, valid, image * (height * width),
                height, width, scale,
            )  # fmt: skip
            kernel = tl.load(weight + line[None, :] + channel[:, None], mask=within[:, None] & own[None, :], other=0.0)
            sums = tl.dot(samples.to(kernel.dtype), kernel, sums, input_precision=PRECISION)
    if BIAS:
        sums += tl.load(bias + out, mask=own, other=0.0).to(tl.float32)[None, :]
    line = tl.cast(pixel, tl.int64)
    if SPLIT:
        line += tl.program_id(2).to(tl.int64) * pixels
    to = line[:, None] * outputs + out[None, :]
    tl.store(output + to, sums.to(output.dtype.element_ty), mask=valid[:, None] & own[None, :])


@triton.jit
def sum_of_parts_kernel(
    sums, bias, output, pixels, outputs, parts, BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """A block of the output from the parts of the depth: their sum in order, and the bias."""
    outputs = chunks(outputs, output.dtype)
    pixel = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    out = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    own = out < outputs
    within = (pixel < pixels)[:, None] & own[None, :]
    to = pixel[:, None] * outputs + out[None, :]
    total = tl.load(sums + to, mask=within, other=0.0)
    for part in range(1, parts):
        total += tl.load(sums + (tl.cast(part, tl.int64) * pixels * outputs + to), mask=within, other=0.0)
    if BIAS:
        total += tl.load(bias + out, mask=own, other=0.0).to(tl.float32)[None, :]
    tl.store(output + to, total.to(output.dtype.element_ty), mask=within)


def _worth_trying(configs: Sequence[triton.Config], given: Mapping[str, Any], **rest: Any) -> list[triton.Config]:
    """Return the tiles that are not half empty, and if the depth is split the small ones that its parts are for."""
    return [
        one
        for one in configs
        if one.kwargs["BLOCK_N"] < 2 * max(given["group_outputs"], SMALL)
        and (one.kwargs["BLOCK_M"] == SMALL or not rest["SPLIT"])
    ]


KERNEL = Tuned(
    deform_conv_kernel,
    {
        "half": (
            config(4, 2, BLOCK_M=64, BLOCK_N=64, BLOCK_K=32),
            config(4, 1, BLOCK_M=64, BLOCK_N=128, BLOCK_K=32),
            config(8, 2, BLOCK_M=128, BLOCK_N=128, BLOCK_K=32),
            config(8, 1, BLOCK_M=128, BLOCK_N=256, BLOCK_K=32),
        ),
        "tf32": (
            config(4, 2, BLOCK_M=64, BLOCK_N=64, BLOCK_K=32),
            config(8, 2, BLOCK_M=64, BLOCK_N=128, BLOCK_K=32),
            config(8, 1, BLOCK_M=128, BLOCK_N=128, BLOCK_K=16),
            config(8, 1, BLOCK_M=128, BLOCK_N=256, BLOCK_K=16),
        ),
        "ieee": (
            config(8, 1, BLOCK_M=64, BLOCK_N=64, BLOCK_K=16),
            config(4, 1, BLOCK_M=32, BLOCK_N=32, BLOCK_K=16),
            config(8, 1, BLOCK_M=64, BLOCK_N=128, BLOCK_K=32),
            config(8, 1, BLOCK_M=128, BLOCK_N=128, BLOCK_K=16),
        ),
    },
    key=("channels", "outputs", "taps", "problem", "group_outputs", "SPLIT"),
    prune=_worth_trying,
)
SUMS = Tuned(sum_of_parts_kernel, {"any": (config(4, BLOCK_M=8, BLOCK_N=64),)}, key=())


def parts_of_depth(pixels: int, groups: int, group_outputs: int, depth: int, processors: int) -> int:
    """Return how many parts the depth of a group's product is split into (csrc/cuda/conv_policy.h has the same rule).

    As many as give each multiprocessor two programs of a small tile, but with at least MIN_DEPTH numbers a part. One
    where the pixels are a symbol, so that a compiled program does not depend on their number.
    """
    if not isinstance(pixels, int):
        return 1
    columns = 2 * SMALL if group_outputs > SMALL else SMALL
    programs = math.ceil(pixels / SMALL) * groups * math.ceil(group_outputs / columns)
    return max(1, min(math.ceil(2 * processors / max(programs, 1)), depth // MIN_DEPTH))


class _Problem:
    """The arguments of a convolution as the kernels take them.

    Channels come in pieces within one group and one offset group, outputs group by group; each is filled up to whole 16
    bytes.
    """

    def __init__(self, a: Arguments) -> None:
        dtype = a.input.dtype
        self.groups = a.input.shape[1] // a.weight.shape[1]
        self.offset_groups = a.offset.shape[1] // (2 * a.weight.shape[2] * a.weight.shape[3])
        self.piece = math.gcd(a.weight.shape[1], a.input.shape[1] // self.offset_groups)
        self.each = a.weight.shape[0] // self.groups
        self.input = to_channels_last(whole_chunks(a.input, 1, self.piece), dtype)
        kernel = whole_chunks(whole_chunks(a.weight.to(dtype), 1, self.piece), 0, self.each)
        self.weight = to_channels_last(kernel, dtype)
        pieces = a.input.shape[1] // self.piece
        self.whole_piece, self.whole_each = self.input.shape[1] // pieces, self.weight.shape[0] // self.groups
        self.offset = dense_offsets(a.offset, dtype)
        self.mask = None if a.mask is None else dense_offsets(a.mask, dtype)
        # Taps, the kernel's columns, and the arguments of the convolution, in the kernels' order.
        self.geometry = (
            a.weight.shape[2] * a.weight.shape[3], a.weight.shape[3], *a.stride, *a.padding, *a.dilation,
        )  # fmt: skip
        # Convolutions ask PyTorch's switch for convolutions.
        self.kind = kind_of(a.input, torch.backends.cudnn.conv.fp32_precision == "tf32")  # type: ignore[attr-defined]
        self.precision = "tf32" if self.kind == "tf32" else "ieee"
        self.problem = bucket(a.offset.shape[0] * a.offset.shape[2] * a.offset.shape[3])

    def sizes(self, pixels: int) -> tuple[int, ...]:
        """Return pixels, sizes and channels, in the kernels' order."""
        channels = self.input.shape[1]
        return (
            pixels, *self.offset.shape[2:], *self.input.shape[2:], channels, *self.weight.shape[:2], self.whole_each,
            channels // self.offset_groups, self.whole_piece,
        )  # fmt: skip

    def offset_strides(self) -> tuple[int, ...]:
        """Return the strides of offset and mask, and the bucket."""
        return *strides(self.offset), *strides(self.offset if self.mask is None else self.mask), self.problem

    def tensors(self, images: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Return input, offset and mask of some images; without a mask the offset again, which is then not read."""
        return self.input[images], self.offset[images], (self.offset if self.mask is None else self.mask)[images]


@operator
def modulated_deform_conv2d(a: Arguments) -> Tensor:
    """See :func:`bkd_fast.ops.modulated_deform_conv2d`."""
    p = _Problem(a)
    shape = (a.input.shape[0], p.weight.shape[0], *a.offset.shape[2:])
    output = torch.empty(shape, dtype=a.input.dtype, device=a.input.device, memory_format=torch.channels_last)
    bias = p.weight if a.bias is None else whole_chunks(a.bias.to(a.input.dtype), 0, p.each).contiguous()
    kernel, outputs, depth = KERNEL(p.kind), p.weight.shape[0], p.weight.shape[1] * p.geometry[0]
    for images in image_slices(a.offset, a.input):
        image, offsets, modulation = p.tensors(images)
        pixels = offsets.shape[0] * offsets.shape[2] * offsets.shape[3]
        parts = parts_of_depth(pixels, p.groups, p.whole_each, depth, multiprocessors(a.input))
        sums = output[images] if parts == 1 else floats((parts, pixels, outputs), image)
        wrap_triton(kernel)[
            lambda meta, pixels=pixels, parts=parts: (
                triton.cdiv(pixels, meta["BLOCK_M"]),
                p.groups * triton.cdiv(p.whole_each, meta["BLOCK_N"]),
                parts,
            )
        ](
            image, offsets, modulation, p.weight, bias, sums, *p.sizes(pixels),
            *p.geometry, *p.offset_strides(),
            MASK=a.mask is not None, BIAS=a.bias is not None and parts == 1, PRECISION=p.precision, SPLIT=parts > 1,
        )  # fmt: skip
        if parts > 1:
            wrap_triton(SUMS())[
                lambda meta, pixels=pixels: (
                    triton.cdiv(pixels, meta["BLOCK_M"]),
                    triton.cdiv(outputs, meta["BLOCK_N"]),
                )
            ](sums, bias, output[images], pixels, outputs, parts, BIAS=a.bias is not None)
    return without_chunks(output, 1, p.each, p.whole_each)


MAX_PROGRAMS = 512  # that the pixels of the weights' gradient are split over


@triton.jit
def deform_conv_backward_kernel(
    grad, input, offset, mask, weight, grad_input, factor, grad_offset, grad_mask,
    pixels, rows, columns, height, width, channels, outputs, group_channels, group_outputs, offset_channels, piece,
    taps, kernel_columns, stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x,
    offset_image, offset_channel, offset_pixel, mask_image, mask_channel, mask_pixel, problem,
    MASK: tl.constexpr, GRAD_INPUT: tl.constexpr, GRAD_OFFSET: tl.constexpr, GRAD_MASK: tl.constexpr,
    EXACT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradients by input, offset and mask, of a block of pixels and one tap of one offset group.

    The gradient of BLOCK_N channels' samples is the product of the output's gradient and the weights, BLOCK_K outputs
    at a time. It is spread over the four neighbours at once; nothing of it is stored. Nobody else has this tap of these
    pixels, so that only the input's gradient is added to.
    """
    channels, outputs, group_channels, group_outputs, offset_channels, piece = in_chunks(
        channels, outputs, group_channels, group_outputs, offset_channels, piece, input.dtype
    )
    pixel = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid, image, place, row, column = place_of(pixel, pixels, rows, columns)
    slot = tl.program_id(1)
    tap = slot % taps
    begin = slot // taps * offset_channels
    base = image * (height * width)
    to = channel_at(image, place, 2 * slot, offset_image, offset_channel, offset_pixel)
    offset_y = tl.load(offset + to, mask=valid, other=0.0)
    offset_x = tl.load(offset + to + offset_channel, mask=valid, other=0.0)
    top, left, down, right = sampling_position(
        offset_y, offset_x, tap, kernel_columns, row, column,
        stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x, height, width,
    )  # fmt: skip
    to = channel_at(image, place, slot, mask_image, mask_channel, mask_pixel)
    scale = modulation(mask, to, valid, MASK)
    whole = 1.0
    if EXACT:
        whole = tl.load(factor)
    grad_at = tl.cast(pixel, tl.int64)[:, None] * outputs
    first_dots = tl.zeros((BLOCK_M,), tl.float32)
    second_dots = tl.zeros((BLOCK_M,), tl.float32)
    third_dots = tl.zeros((BLOCK_M,), tl.float32)
    fourth_dots = tl.zeros((BLOCK_M,), tl.float32)
    moving: tl.constexpr = GRAD_OFFSET or GRAD_MASK
    blocks = tl.cdiv(piece, BLOCK_N)
    for step in range(0, offset_channels // piece * blocks):
        first = begin + step // blocks * piece
        channel = step % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
        within = channel < piece
        group = first // group_channels
        by_samples = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, group_outputs, BLOCK_K):
            part = start + tl.arange(0, BLOCK_K)
            own = part < group_outputs
            out = group * group_outputs + part
            slopes = tl.load(grad + grad_at + out[None, :], mask=valid[:, None] & own[None, :], other=0.0)
            line = (tl.cast(out, tl.int64) * taps + tap) * group_channels + (first - group * group_channels)
            kernel = tl.load(weight + line[:, None] + channel[None, :], mask=own[:, None] & within[None, :], other=0.0)
            by_samples = tl.dot(slopes, kernel, by_samples, input_precision=PRECISION)
        first_dots += scatter(
            by_samples, input + first, grad_input + first, whole, channels, channel, within, top, left, down, right,
            valid, base, height, width, scale, 0, 0, GRAD_INPUT, moving, EXACT,
        )  # fmt: skip
        second_dots += scatter(
            by_samples, input + first, grad_input + first, whole, channels, channel, within, top, left, down, right,
            valid, base, height, width, scale, 0, 1, GRAD_INPUT, moving, EXACT,
        )  # fmt: skip
        third_dots += scatter(
            by_samples, input + first, grad_input + first, whole, channels, channel, within, top, left, down, right,
            valid, base, height, width, scale, 1, 0, GRAD_INPUT, moving, EXACT,
        )  # fmt: skip
        fourth_dots += scatter(
            by_samples, input + first, grad_input + first, whole, channels, channel, within, top, left, down, right,
            valid, base, height, width, scale, 1, 1, GRAD_INPUT, moving, EXACT,
        )  # fmt: skip
    if moving:
        write_offset_grads(
            grad_offset, grad_mask, first_dots, second_dots, third_dots, fourth_dots, top, left, down, right, valid,
            image,
            place, rows * columns, height, width, scale, slot, tl.num_programs(1), GRAD_OFFSET, GRAD_MASK,
        )  # fmt: skip


@triton.jit
def deform_conv_weight_kernel(
    grad, input, offset, mask, sums,
    pixels, rows, columns, height, width, channels, outputs, group_channels, group_outputs, offset_channels, piece,
    taps, kernel_columns, stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x,
    offset_image, offset_channel, offset_pixel, mask_image, mask_channel, mask_pixel, problem,
    MASK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The gradient by the weights of BLOCK_M outputs and BLOCK_N channels of one tap, over one split of the pixels."""
    channels, outputs, group_channels, group_outputs, offset_channels, piece = in_chunks(
        channels, outputs, group_channels, group_outputs, offset_channels, piece, input.dtype
    )
    channel_blocks = tl.cdiv(piece, BLOCK_N)
    tap = tl.program_id(0) % taps
    block = tl.program_id(0) // taps  # of the input's channels, which come piece by piece
    first = block // channel_blocks * piece
    channel = block % channel_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    within = channel < piece
    group = first // group_channels
    slot = first // offset_channels * taps + tap
    part = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    own = part < group_outputs
    out = group * group_outputs + part
    each = tl.cdiv(tl.cdiv(pixels, tl.num_programs(2)), BLOCK_K) * BLOCK_K
    begin = tl.program_id(2) * each
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(begin, tl.minimum(begin + each, pixels), BLOCK_K):
        pixel = start + tl.arange(0, BLOCK_K)
        valid, image, place, row, column = place_of(pixel, pixels, rows, columns)
        to = channel_at(image, place, 2 * slot, offset_image, offset_channel, offset_pixel)
        offset_y = tl.load(offset + to, mask=valid, other=0.0)
        offset_x = tl.load(offset + to + offset_channel, mask=valid, other=0.0)
        top, left, down, right = sampling_position(
            offset_y, offset_x, tap, kernel_columns, row, column,
            stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x, height, width,
        )  # fmt: skip
        to = channel_at(image, place, slot, mask_image, mask_channel, mask_pixel)
        scale = modulation(mask, to, valid, MASK)
        samples = sample(
            input + first, channels, channel, within, top, left, down, right, valid, image * (height * width),
            height, width, scale,
        )  # fmt: skip
        grad_at = tl.cast(pixel, tl.int64)[None, :] * outputs + out[:, None]
        slopes = tl.load(grad + grad_at, mask=own[:, None] & valid[None, :], other=0.0)
        total = tl.dot(slopes, samples.to(slopes.dtype), total, input_precision=PRECISION)
    line = (tl.program_id(2) * tl.cast(outputs, tl.int64) + out) * taps + tap
    to = line[:, None] * group_channels + (first - group * group_channels + channel)[None, :]
    tl.store(sums + to, total, mask=own[:, None] & within[None, :])


BACKWARD = Tuned(
    deform_conv_backward_kernel,
    {
        "half": (
            config(8, 2, BLOCK_M=64, BLOCK_N=32, BLOCK_K=64),
            config(4, 2, BLOCK_M=32, BLOCK_N=32, BLOCK_K=64),
            config(8, 2, BLOCK_M=32, BLOCK_N=64, BLOCK_K=64),
        ),
        "tf32": (
            config(8, 2, BLOCK_M=64, BLOCK_N=32, BLOCK_K=32),
            config(4, 2, BLOCK_M=32, BLOCK_N=32, BLOCK_K=32),
        ),
        "ieee": (
            config(4, 1, BLOCK_M=32, BLOCK_N=32, BLOCK_K=16),
            config(8, 1, BLOCK_M=64, BLOCK_N=32, BLOCK_K=16),
        ),
        # Accumulator of whole numbers, in any type: 64 bits each, and an addition for each.
        "exact": (config(8, 1, BLOCK_M=32, BLOCK_N=32, BLOCK_K=16),),
    },
    key=("channels", "outputs", "taps", "problem"),
    sums=("grad_input",),
)
WEIGHT = Tuned(
    deform_conv_weight_kernel,
    {
        "half": (
            config(4, 2, BLOCK_M=64, BLOCK_N=64, BLOCK_K=32),
            config(8, 2, BLOCK_M=128, BLOCK_N=64, BLOCK_K=32),
            config(4, 2, BLOCK_M=128, BLOCK_N=32, BLOCK_K=32),
        ),
        "tf32": (
            config(4, 2, BLOCK_M=64, BLOCK_N=64, BLOCK_K=16),
            config(8, 2, BLOCK_M=128, BLOCK_N=64, BLOCK_K=16),
        ),
        "ieee": (
            config(4, 1, BLOCK_M=32, BLOCK_N=32, BLOCK_K=16),
            config(8, 1, BLOCK_M=64, BLOCK_N=64, BLOCK_K=16),
        ),
    },
    key=("channels", "outputs", "taps", "problem"),
)


@operator
def modulated_deform_conv2d_backward(grad: Tensor, a: Arguments, needs: Sequence[bool]) -> list[Tensor]:
    """Return the gradients with respect to all tensors; empty where ``needs`` is False."""
    p = _Problem(a)
    slopes = to_channels_last(whole_chunks(grad.to(a.input.dtype), 1, p.each), a.input.dtype)
    exact = exact_sums(needs[0])
    grad_input = Accumulator(
        p.input, needs[0], convolution_bound(slopes, p.weight, p.mask, a.offset) if exact else None
    )
    grad_offset = floats(a.offset.shape if needs[1] else (0,), a.input)
    grad_mask = floats((0,) if a.mask is None or not needs[4] else a.mask.shape, a.input)
    grad_weight = torch.zeros(p.weight.shape if needs[2] else (0,), dtype=torch.float32, device=a.input.device)
    for images in image_slices(a.offset, a.input):
        image, offsets, modulation = p.tensors(images)
        pixels = offsets.shape[0] * offsets.shape[2] * offsets.shape[3]
        arguments = (*p.sizes(pixels), *p.geometry, *p.offset_strides())
        if needs[0] or needs[1] or needs[4]:
            backward = BACKWARD("exact" if exact else p.kind)
            wrap_triton(backward)[
                lambda meta, pixels=pixels: (triton.cdiv(pixels, meta["BLOCK_M"]), p.offset_groups * p.geometry[0])
            ](
                slopes[images], image, offsets, modulation, p.weight,
                grad_input.buffer[images], slopes if grad_input.scale is None else grad_input.scale,
                grad_offset[images], grad_mask[images], *arguments,
                MASK=a.mask is not None, GRAD_INPUT=needs[0], GRAD_OFFSET=needs[1], GRAD_MASK=needs[4], EXACT=exact,
                PRECISION=p.precision,
            )  # fmt: skip
        if needs[2]:
            grad_weight += _grad_weight(p, slopes[images], (image, offsets, modulation), arguments, a.mask is not None)
    total = grad_input.total()
    if needs[2]:
        grad_weight = without_chunks(without_chunks(grad_weight, 0, p.each, p.whole_each), 1, p.piece, p.whole_piece)
    return [
        without_chunks(total, 1, p.piece, p.whole_piece) if needs[0] else total,
        grad_offset,
        grad_weight,
        grad.sum((0, 2, 3), dtype=torch.float32).to(grad.dtype) if needs[3] else grad.new_empty(0),
        grad_mask,
    ]


def _grad_weight(
    p: _Problem, slopes: Tensor, tensors: tuple[Tensor, Tensor, Tensor], arguments: tuple[int, ...], masked: bool
) -> Tensor:
    """Return the gradient of some images, shaped as the weights. Pixels are split where there are few weights."""
    outputs, channels, *size = p.weight.shape
    taps, pieces = size[0] * size[1], p.input.shape[1] // p.whole_piece
    blocks = taps * pieces * triton.cdiv(p.whole_piece, 64) * triton.cdiv(p.whole_each, 64)
    splits = max(1, min(MAX_PROGRAMS // blocks, 64))
    sums = floats((splits, outputs, taps, channels), slopes)
    kernel = WEIGHT(p.kind)
    wrap_triton(kernel)[
        lambda meta: (
            taps * pieces * triton.cdiv(p.whole_piece, meta["BLOCK_N"]),
            triton.cdiv(p.whole_each, meta["BLOCK_M"]),
            splits,
        )
    ](slopes, *tensors, sums, *arguments, MASK=masked, PRECISION=p.precision)
    return sums.sum(0).unflatten(1, size).permute(0, 3, 1, 2)
