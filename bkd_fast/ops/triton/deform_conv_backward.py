"""The gradients of the modulated deformable convolution in Triton."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from bkd_fast.ops.deform_conv import CONV_BACKWARD_SCHEMA
from bkd_fast.ops.gpu.layout import floats, last, parts, whole_chunks, without_chunks
from bkd_fast.ops.gpu.sums import Sums, convolution_bound, exact_sums
from bkd_fast.ops.triton.deform_conv import Problem, geometry, in_chunks
from bkd_fast.ops.triton.launching import Tuned, config, operator
from bkd_fast.ops.triton.sampling import channel_at, modulation, place_of, sample, scatter, spot, write_moves

MOST_PROGRAMS = 512  # that the pixels of the weights' gradient are split over


@triton.jit
def deform_conv_backward_kernel(
    grad, input, offset, mask, weight, by_input, factor, by_offset, by_mask,
    pixels, rows, columns, height, width, channels, outputs, group_channels, group_outputs, offset_channels, piece,
    taps, kernel_columns, stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x,
    offset_image, offset_channel, offset_pixel, mask_image, mask_channel, mask_pixel, problem,
    MASK: tl.constexpr, BY_INPUT: tl.constexpr, BY_OFFSET: tl.constexpr, BY_MASK: tl.constexpr, EXACT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
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
    move_y = tl.load(offset + to, mask=valid, other=0.0)
    move_x = tl.load(offset + to + offset_channel, mask=valid, other=0.0)
    top, left, down, right = spot(
        move_y, move_x, tap, kernel_columns, row, column,
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
    moving: tl.constexpr = BY_OFFSET or BY_MASK
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
            by_samples, input + first, by_input + first, whole, channels, channel, within, top, left, down, right,
            valid, base, height, width, scale, 0, 0, BY_INPUT, moving, EXACT,
        )  # fmt: skip
        second_dots += scatter(
            by_samples, input + first, by_input + first, whole, channels, channel, within, top, left, down, right,
            valid, base, height, width, scale, 0, 1, BY_INPUT, moving, EXACT,
        )  # fmt: skip
        third_dots += scatter(
            by_samples, input + first, by_input + first, whole, channels, channel, within, top, left, down, right,
            valid, base, height, width, scale, 1, 0, BY_INPUT, moving, EXACT,
        )  # fmt: skip
        fourth_dots += scatter(
            by_samples, input + first, by_input + first, whole, channels, channel, within, top, left, down, right,
            valid, base, height, width, scale, 1, 1, BY_INPUT, moving, EXACT,
        )  # fmt: skip
    if moving:
        write_moves(
            by_offset, by_mask, first_dots, second_dots, third_dots, fourth_dots, top, left, down, right, valid, image,
            place, rows * columns, height, width, scale, slot, tl.num_programs(1), BY_OFFSET, BY_MASK,
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
        move_y = tl.load(offset + to, mask=valid, other=0.0)
        move_x = tl.load(offset + to + offset_channel, mask=valid, other=0.0)
        top, left, down, right = spot(
            move_y, move_x, tap, kernel_columns, row, column,
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
        # Sums of whole numbers, in any type: 64 bits each, and an addition for each.
        "exact": (config(8, 1, BLOCK_M=32, BLOCK_N=32, BLOCK_K=16),),
    },
    key=("channels", "outputs", "taps", "problem"),
    sums=("by_input",),
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


@operator(CONV_BACKWARD_SCHEMA)
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
    p = Problem(input, offset, weight, mask)
    slopes = last(whole_chunks(grad.to(input.dtype), 1, p.each), input.dtype)
    exact = exact_sums(needs[0])
    by_input = Sums(p.input, needs[0], convolution_bound(slopes, p.weight, p.mask, offset) if exact else None)
    by_offset = floats(offset.shape if needs[1] else (0,), input)
    by_mask = floats((0,) if mask is None or not needs[4] else mask.shape, input)
    by_weight = torch.zeros(p.weight.shape if needs[2] else (0,), dtype=torch.float32, device=input.device)
    shape = geometry(weight, stride, padding, dilation)
    for images in parts(offset, input):
        image, offsets, modulation = p.tensors(images)
        pixels = offsets.shape[0] * offsets.shape[2] * offsets.shape[3]
        arguments = (*p.sizes(pixels), *shape, *p.moves())
        if needs[0] or needs[1] or needs[4]:
            backward = BACKWARD("exact" if exact else p.kind)
            wrap_triton(backward)[
                lambda meta, pixels=pixels: (triton.cdiv(pixels, meta["BLOCK_M"]), p.offset_groups * shape[0])
            ](
                slopes[images], image, offsets, modulation, p.weight,
                by_input.room[images], slopes if by_input.scale is None else by_input.scale, by_offset[images],
                by_mask[images], *arguments,
                MASK=mask is not None, BY_INPUT=needs[0], BY_OFFSET=needs[1], BY_MASK=needs[4], EXACT=exact,
                PRECISION=p.precision,
            )  # fmt: skip
        if needs[2]:
            by_weight += _by_weight(p, slopes[images], (image, offsets, modulation), arguments, mask is not None)
    found = by_input.total()
    if needs[0]:
        found = without_chunks(found, 1, p.piece, p.whole_piece)
    if needs[2]:
        by_weight = without_chunks(without_chunks(by_weight, 0, p.each, p.whole_each), 1, p.piece, p.whole_piece)
    like = grad if mask is None else mask
    return (
        found.to(input.dtype),
        by_offset.to(offset.dtype),
        by_weight.to(weight.dtype),
        grad.sum((0, 2, 3), dtype=torch.float32).to(grad.dtype) if needs[3] else grad.new_empty(0),
        by_mask.to(like.dtype),
    )


def _by_weight(
    p: Problem, slopes: Tensor, tensors: tuple[Tensor, Tensor, Tensor], arguments: tuple[int, ...], masked: bool
) -> Tensor:
    """The gradient of some images, shaped as the weights. The pixels are split where there are few weights."""
    outputs, channels, *size = p.weight.shape
    taps, pieces = size[0] * size[1], p.input.shape[1] // p.whole_piece
    blocks = taps * pieces * triton.cdiv(p.whole_piece, 64) * triton.cdiv(p.whole_each, 64)
    splits = max(1, min(MOST_PROGRAMS // blocks, 64))
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
