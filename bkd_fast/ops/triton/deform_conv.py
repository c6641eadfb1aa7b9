"""Modulated deformable convolution as an implicit GEMM in Triton: samples go from registers to the tensor cores."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from bkd_fast.ops.deform_conv import CONV_SCHEMA
from bkd_fast.ops.gpu.layout import last, moves, parts, whole_chunks, without_chunks
from bkd_fast.ops.triton.launching import Tuned, bucket, config, kind_of, operator, strides
from bkd_fast.ops.triton.sampling import channel_at, chunks, modulation, place_of, sample, spot


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
    MASK: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A block of pixels times a block of one group's outputs.

    The depth of the product is ``piece`` channels of one group and one offset group at a time, tap after tap, so that a
    pixel's four neighbours and their weights are worked out once for all of a piece's channels.
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
    for step in range(0, group_channels // piece * taps):
        tap = step % taps
        first = group * group_channels + step // taps * piece
        slot = first // offset_channels * taps + tap
        to = channel_at(image, place, 2 * slot, offset_image, offset_channel, offset_pixel)
        move_y = tl.load(offset + to, mask=valid, other=0.0)
        move_x = tl.load(offset + to + offset_channel, mask=valid, other=0.0)
        top, left, down, right = spot(
            move_y, move_x, tap, kernel_columns, row, column,
            stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x, height, width,
        )  # fmt: skip
        to = channel_at(image, place, slot, mask_image, mask_channel, mask_pixel)
        scale = modulation(mask, to, valid, MASK)
        line = (tl.cast(out, tl.int64) * taps + tap) * group_channels + step // taps * piece
        for start in range(0, piece, BLOCK_K):
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
    to = tl.cast(pixel, tl.int64)[:, None] * outputs + out[None, :]
    tl.store(output + to, sums.to(output.dtype.element_ty), mask=valid[:, None] & own[None, :])


KERNEL = Tuned(
    deform_conv_kernel,
    {
        "half": (
            config(4, 2, BLOCK_M=64, BLOCK_N=64, BLOCK_K=32),
            config(8, 2, BLOCK_M=128, BLOCK_N=128, BLOCK_K=32),
            config(8, 2, BLOCK_M=64, BLOCK_N=256, BLOCK_K=32),
            config(4, 1, BLOCK_M=64, BLOCK_N=128, BLOCK_K=32),
        ),
        "tf32": (
            config(4, 2, BLOCK_M=64, BLOCK_N=64, BLOCK_K=32),
            config(8, 2, BLOCK_M=64, BLOCK_N=128, BLOCK_K=32),
            config(8, 1, BLOCK_M=128, BLOCK_N=128, BLOCK_K=16),
        ),
        "ieee": (
            config(8, 1, BLOCK_M=64, BLOCK_N=64, BLOCK_K=16),
            config(4, 1, BLOCK_M=32, BLOCK_N=32, BLOCK_K=16),
        ),
    },
    key=("channels", "outputs", "taps", "problem"),
)


class Problem:
    """The arguments of a convolution as the kernels take them.

    Channels come in pieces that lie within one group and one offset group, outputs group by group; each is filled up to
    whole 16 bytes.
    """

    def __init__(self, input: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None) -> None:
        dtype = input.dtype
        self.groups = input.shape[1] // weight.shape[1]
        self.offset_groups = offset.shape[1] // (2 * weight.shape[2] * weight.shape[3])
        self.piece = math.gcd(weight.shape[1], input.shape[1] // self.offset_groups)
        self.each = weight.shape[0] // self.groups
        self.input = last(whole_chunks(input, 1, self.piece), dtype)
        kernel = whole_chunks(whole_chunks(weight.to(dtype), 1, self.piece), 0, self.each)
        self.weight = last(kernel, dtype)
        pieces = input.shape[1] // self.piece
        self.whole_piece, self.whole_each = self.input.shape[1] // pieces, self.weight.shape[0] // self.groups
        self.offset = moves(offset, dtype)
        self.mask = None if mask is None else moves(mask, dtype)
        # Convolutions ask PyTorch's switch for convolutions.
        self.kind = kind_of(input, torch.backends.cudnn.conv.fp32_precision == "tf32")  # type: ignore[attr-defined]
        self.precision = "tf32" if self.kind == "tf32" else "ieee"
        self.problem = bucket(offset.shape[0] * offset.shape[2] * offset.shape[3])

    def sizes(self, pixels: int) -> tuple[int, ...]:
        """Pixels, sizes and channels, in the kernels' order."""
        channels = self.input.shape[1]
        return (
            pixels, *self.offset.shape[2:], *self.input.shape[2:], channels, *self.weight.shape[:2], self.whole_each,
            channels // self.offset_groups, self.whole_piece,
        )  # fmt: skip

    def moves(self) -> tuple[int, ...]:
        """The strides of offset and mask, and the bucket."""
        return *strides(self.offset), *strides(self.offset if self.mask is None else self.mask), self.problem

    def tensors(self, images: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Input, offset and mask of some images; offset once more without a mask, which is then not read."""
        return self.input[images], self.offset[images], (self.offset if self.mask is None else self.mask)[images]


def geometry(weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> tuple[int, ...]:
    """Taps, the kernel's columns, and the arguments of the convolution, in the kernels' order."""
    return weight.shape[2] * weight.shape[3], weight.shape[3], *stride, *padding, *dilation


@operator(CONV_SCHEMA)
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
    p = Problem(input, offset, weight, mask)
    shape = (input.shape[0], p.weight.shape[0], *offset.shape[2:])
    output = torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=torch.channels_last)
    shift = p.weight if bias is None else whole_chunks(bias.to(input.dtype), 0, p.each).contiguous()
    kernel = KERNEL(p.kind)
    for images in parts(offset, input):
        image, offsets, modulation = p.tensors(images)
        pixels = offsets.shape[0] * offsets.shape[2] * offsets.shape[3]
        wrap_triton(kernel)[
            lambda meta, pixels=pixels: (
                triton.cdiv(pixels, meta["BLOCK_M"]),
                p.groups * triton.cdiv(p.whole_each, meta["BLOCK_N"]),
            )
        ](
            image, offsets, modulation, p.weight, shift, output[images], *p.sizes(pixels),
            *geometry(weight, stride, padding, dilation), *p.moves(),
            MASK=mask is not None, BIAS=bias is not None, PRECISION=p.precision,
        )  # fmt: skip
    return without_chunks(output, 1, p.each, p.whole_each)
