"""Pairs of features, a teacher's and a student's, in Triton: their sums over channels, and the gradient of those.

Levels are read in place, channels first or last, in blocks of pixels and channels; a student is laid out as its
teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from bkd_fast.ops.layout import CHUNK_BYTES
from bkd_fast.ops.levels import Levels
from bkd_fast.ops.triton_common import Tuned, config, strides
from bkd_fast.ops.triton_sampling import chunks

EPSILON = tl.constexpr(1e-8)  # smallest product of norms in a cosine


@triton.jit
def pair_sums(
    teacher, first, second, at, valid, channels, channel_stride,
    TWO: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Accumulator over the channels of each pixel, ``at`` its channel 0, for one student or TWO, from one read of all.

    The teacher's square; then of each student the dot product, the square, and the square of the difference.
    """
    teacher_square = tl.zeros((BLOCK_P,), tl.float32)
    first_dot = tl.zeros((BLOCK_P,), tl.float32)
    first_square = tl.zeros((BLOCK_P,), tl.float32)
    first_difference = tl.zeros((BLOCK_P,), tl.float32)
    second_dot = tl.zeros((BLOCK_P,), tl.float32)
    second_square = tl.zeros((BLOCK_P,), tl.float32)
    second_difference = tl.zeros((BLOCK_P,), tl.float32)
    for start in range(0, channels, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        to = at[:, None] + tl.cast(channel, tl.int64)[None, :] * channel_stride
        within = valid[:, None] & (channel < channels)[None, :]
        t = tl.load(teacher + to, mask=within, other=0.0).to(tl.float32)
        s = tl.load(first + to, mask=within, other=0.0).to(tl.float32)
        teacher_square += tl.sum(t * t, 1)
        first_dot += tl.sum(t * s, 1)
        first_square += tl.sum(s * s, 1)
        first_difference += tl.sum((t - s) * (t - s), 1)
        if TWO:
            s = tl.load(second + to, mask=within, other=0.0).to(tl.float32)
            second_dot += tl.sum(t * s, 1)
            second_square += tl.sum(s * s, 1)
            second_difference += tl.sum((t - s) * (t - s), 1)
    return (
        teacher_square, first_dot, first_square, first_difference, second_dot, second_square, second_difference,
    )  # fmt: skip


@triton.jit
def one_less_cosine(dot, teacher_square, student_square):
    return 1 - dot / tl.maximum(tl.sqrt(teacher_square * student_square), EPSILON)


@triton.jit
def hinted(
    pixels, plane, channels, image_stride, channel_stride, pixel_stride, like: tl.constexpr,
    LAST: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The sizes and strides; the compiler then knows which are whole chunks."""
    if WHOLE:
        image_stride = chunks(image_stride, like)
        if LAST:
            channels, pixel_stride = chunks(channels, like), chunks(pixel_stride, like)
        else:
            pixels, plane, channel_stride = (
                chunks(pixels, like),
                chunks(plane, like),
                chunks(channel_stride, like),
            )
    return pixels, plane, channels, image_stride, channel_stride, pixel_stride


@triton.jit
def start_of(pixel, plane, image_stride, pixel_stride):
    """Return the address of channel 0 of numbered pixels, and their images; 64 bits as ``pixel``."""
    image = pixel // plane
    return image * image_stride + (pixel - image * plane) * pixel_stride, image


@triton.jit
def pair_gradient_kernel(
    teacher, student, statistics, grad, grad_teacher, grad_student,
    pixels, plane, channels, image_stride, channel_stride, pixel_stride, vectors, direction, value,
    FLAT: tl.constexpr, EACH: tl.constexpr, GRAD_TEACHER: tl.constexpr, GRAD_STUDENT: tl.constexpr, ADD: tl.constexpr,
    LAST: tl.constexpr, WHOLE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradients by a block of features of ``direction`` (1 - cos) + ``value`` |t - s|^2.

    statistics: (3, vectors), dot product and squares of each pixel, or of each image where FLAT. grad: one number, or
    where EACH one for each pixel.
    """
    pixels, plane, channels, image_stride, channel_stride, pixel_stride = hinted(
        pixels, plane, channels, image_stride, channel_stride, pixel_stride, teacher.dtype, LAST, WHOLE
    )
    pixel = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    valid = pixel < pixels
    at, image = start_of(pixel, plane, image_stride, pixel_stride)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    within = valid[:, None] & (channel < channels)[None, :]
    to = at[:, None] + tl.cast(channel, tl.int64)[None, :] * channel_stride
    t = tl.load(teacher + to, mask=within, other=0.0).to(tl.float32)
    s = tl.load(student + to, mask=within, other=0.0).to(tl.float32)
    vector = image if FLAT else pixel
    dot = tl.load(statistics + vector, mask=valid, other=0.0)
    teacher_square = tl.load(statistics + vectors + vector, mask=valid, other=0.0)
    student_square = tl.load(statistics + 2 * vectors + vector, mask=valid, other=0.0)
    upstream = tl.load(grad + (pixel if EACH else pixel * 0), mask=valid, other=0.0)
    norms = tl.sqrt(teacher_square * student_square)
    slope = -direction * upstream / tl.maximum(norms, EPSILON)
    difference = (2 * value * upstream)[:, None] * (t - s)
    regular = tl.where(norms > EPSILON, dot, 0.0)  # a clamped norm is a constant
    smallest = EPSILON * EPSILON
    if GRAD_TEACHER:
        along = regular / tl.maximum(teacher_square, smallest)
        gradient = slope[:, None] * (s - along[:, None] * t) + difference
        if ADD:
            gradient += tl.load(grad_teacher + to, mask=within, other=0.0).to(tl.float32)
        tl.store(grad_teacher + to, gradient.to(grad_teacher.dtype.element_ty), mask=within)
    if GRAD_STUDENT:
        along = regular / tl.maximum(student_square, smallest)
        gradient = slope[:, None] * (t - along[:, None] * s) - difference
        tl.store(grad_student + to, gradient.to(grad_student.dtype.element_ty), mask=within)


GRADIENT = Tuned(
    pair_gradient_kernel,
    # One configuration where a gradient may be added to: tuning would add again and again.
    {"any": (config(4, BLOCK_P=32, BLOCK_C=32),)},
    key=(),
)
BLOCKS = (
    config(8, BLOCK_P=32, BLOCK_C=64),
    config(8, BLOCK_P=16, BLOCK_C=128),
    config(8, BLOCK_P=128, BLOCK_C=16),
)  # of pixels and channels, for channels last and first


def sizes(levels: Levels, level: int) -> tuple[Any, ...]:
    """Pixels of all images and of one, channels (with those that fill chunks, zeros), and the strides of a level."""
    t = levels.teacher[level]
    plane = t.shape[2] * t.shape[3]
    return t.shape[0] * plane, plane, t.shape[1], *strides(t)


def layout(levels: Levels, level: int) -> dict[str, bool]:
    """Of a level, for the kernels: whether channels are last, and whether its rows are whole chunks."""
    t = levels.teacher[level]
    last = not t.is_contiguous()
    unit = CHUNK_BYTES // t.element_size()
    return {"LAST": last, "WHOLE": last or t.shape[2] * t.shape[3] % unit == 0}


def pair_gradients(
    levels: Levels,
    grads: Sequence[Tensor],
    statistics: Sequence[Tensor],
    directions: Sequence[float],
    values: Sequence[float],
    flat: bool,
    needs: Sequence[bool],
    tensors: Sequence[Tensor],
) -> list[Tensor]:
    """Return the gradients of the teacher's levels, then the students'; empty where ``needs`` is False.

    Args:
        grads, statistics, directions, values: of each student level, as :func:`pair_gradient_kernel` takes them.
        tensors: the levels as they were given, whose dtypes the gradients get.
    """
    count = len(levels.teacher)
    several = len(levels.student) > count  # whose parts of a teacher's gradient are added up in float32
    dtypes = [torch.float32 if several else level.dtype for level in levels.teacher]
    dtypes += [level.dtype for level in levels.student]
    gradients = [
        torch.empty_like(level, dtype=dtype) if need else level.new_empty(0)
        for level, dtype, need in zip([*levels.teacher, *levels.student], dtypes, needs, strict=True)
    ]
    kernel = GRADIENT()
    for index, student in enumerate(levels.student):
        level = index % count
        own = (needs[level], needs[count + index])
        own_sizes = sizes(levels, level)
        pixels, channels = own_sizes[0], own_sizes[2]
        if not any(own) or pixels == 0:
            continue
        wrap_triton(kernel)[
            lambda meta, pixels=pixels, channels=channels: (
                triton.cdiv(pixels, meta["BLOCK_P"]),
                triton.cdiv(channels, meta["BLOCK_C"]),
            )
        ](
            levels.teacher[level], student, statistics[index], grads[index], gradients[level], gradients[count + index],
            *own_sizes, statistics[index].shape[-1], directions[index], values[index],
            FLAT=flat, EACH=grads[index].ndim > 0, GRAD_TEACHER=own[0], GRAD_STUDENT=own[1], ADD=index >= count,
            **layout(levels, level),
        )  # fmt: skip
    return levels.results(gradients, tensors, needs)
