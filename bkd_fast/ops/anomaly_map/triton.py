"""The anomaly map in Triton: distances from one read of the features, then upsampled, fused and smoothed."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from bkd_fast.ops.anomaly_map import Arguments, reference
from bkd_fast.ops.layout import floats
from bkd_fast.ops.levels import Levels
from bkd_fast.ops.triton_common import Tuned, bucket, config, operator
from bkd_fast.ops.triton_pairs import (
    BLOCKS,
    hinted,
    layout,
    one_less_cosine,
    pair_gradients,
    pair_sums,
    sizes,
    start_of,
)

TOGETHER = 4  # levels that are upsampled and fused at a time


@triton.jit
def distances_kernel(
    teacher, first, second, distances, first_sums, second_sums,
    pixels, plane, channels, image_stride, channel_stride, pixel_stride,
    direction, value, first_weight, second_weight, exponent, problem,
    TWO: tl.constexpr, ADD: tl.constexpr, RAISE: tl.constexpr, SUMS: tl.constexpr,
    LAST: tl.constexpr, WHOLE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The weighted distances of one or two branches to their teacher, pixel by pixel.

    direction, value: the factors of 1 - cos and of the squared difference. exponent: of the finished sum, where RAISE.

    first_sums, second_sums: (3, pixels), dot product and squares, written where SUMS.
    """
    pixels, plane, channels, image_stride, channel_stride, pixel_stride = hinted(
        pixels, plane, channels, image_stride, channel_stride, pixel_stride, teacher.dtype, LAST, WHOLE
    )
    pixel = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    valid = pixel < pixels
    at, _ = start_of(pixel, plane, image_stride, pixel_stride)
    t, dot, s, difference, second_dot, second_s, second_difference = pair_sums(
        teacher, first, second, at, valid, channels, channel_stride, TWO, BLOCK_P, BLOCK_C
    )
    total = first_weight * (direction * one_less_cosine(dot, t, s) + value * difference)
    if ADD:
        total += tl.load(distances + pixel, mask=valid, other=0.0)
    if SUMS:
        tl.store(first_sums + pixel, dot, mask=valid)
        tl.store(first_sums + pixels + pixel, t, mask=valid)
        tl.store(first_sums + 2 * pixels + pixel, s, mask=valid)
    if TWO:
        total += second_weight * (direction * one_less_cosine(second_dot, t, second_s) + value * second_difference)
        if SUMS:
            tl.store(second_sums + pixel, second_dot, mask=valid)
            tl.store(second_sums + pixels + pixel, t, mask=valid)
            tl.store(second_sums + 2 * pixels + pixel, second_s, mask=valid)
    if RAISE:
        total = tl.exp2(exponent * tl.log2(tl.where(total < 1e-6, 1e-6, total)))  # NaN stays
    tl.store(distances + pixel, total, mask=valid)


@triton.jit
def upsampled(distances, image, y, x, valid, height, width, scale_y, scale_x, ALIGN: tl.constexpr):
    """A level at a position of the map, bilinearly, as PyTorch's interpolate has it."""
    if ALIGN:
        above, left = y * scale_y, x * scale_x
    else:
        above = tl.maximum((y + 0.5) * scale_y - 0.5, 0.0)
        left = tl.maximum((x + 0.5) * scale_x - 0.5, 0.0)
    top, beside = tl.minimum(above.to(tl.int32), height - 1), tl.minimum(left.to(tl.int32), width - 1)
    down, right = above - top, left - beside
    base = image.to(tl.int64) * height * width + top * width + beside
    below = tl.where(top < height - 1, width, 0)
    next_to = tl.where(beside < width - 1, 1, 0)
    a = tl.load(distances + base, mask=valid, other=0.0)
    b = tl.load(distances + base + next_to, mask=valid, other=0.0)
    c = tl.load(distances + base + below, mask=valid, other=0.0)
    d = tl.load(distances + base + below + next_to, mask=valid, other=0.0)
    return (1 - down) * ((1 - right) * a + right * b) + down * ((1 - right) * c + right * d)


@triton.jit
def fused_map_kernel(
    first, second, third, fourth, fused, count, rows, columns,
    height_1, width_1, scale_y_1, scale_x_1, height_2, width_2, scale_y_2, scale_x_2,
    height_3, width_3, scale_y_3, scale_x_3, height_4, width_4, scale_y_4, scale_x_4,
    LEVELS: tl.constexpr, PRODUCT: tl.constexpr, ALIGN: tl.constexpr, MORE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Up to four levels, (N, H_l, W_l), upsampled to (N, rows, columns) and fused; with what is there where MORE."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = index < count
    image = index // (rows * columns)
    place = (index - image * (rows * columns)).to(tl.int32)
    y = place // columns
    x = place - y * columns
    total = upsampled(first, image, y, x, valid, height_1, width_1, scale_y_1, scale_x_1, ALIGN)
    if LEVELS > 1:
        level = upsampled(second, image, y, x, valid, height_2, width_2, scale_y_2, scale_x_2, ALIGN)
        total = total * level if PRODUCT else total + level
    if LEVELS > 2:
        level = upsampled(third, image, y, x, valid, height_3, width_3, scale_y_3, scale_x_3, ALIGN)
        total = total * level if PRODUCT else total + level
    if LEVELS > 3:
        level = upsampled(fourth, image, y, x, valid, height_4, width_4, scale_y_4, scale_x_4, ALIGN)
        total = total * level if PRODUCT else total + level
    if MORE:
        level = tl.load(fused + index, mask=valid, other=0.0)
        total = total * level if PRODUCT else total + level
    tl.store(fused + index, total, mask=valid)


@triton.jit
def smooth_kernel(maps, smoothed, count, length, step, sigma, radius, BLOCK: tl.constexpr):
    """A Gaussian along one axis of ``length`` numbers that lie ``step`` apart; borders are mirrored."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = index < count
    own = (index // step % length).to(tl.int32)
    line = index - own.to(tl.int64) * step
    total = tl.zeros((BLOCK,), tl.float32)
    weights = 0.0
    for k in range(-radius, radius + 1):
        away = k / sigma
        weight = tl.exp(-0.5 * away * away)
        folded = (own + k) % (2 * length)
        folded = tl.where(folded < 0, folded + 2 * length, folded)
        folded = tl.minimum(folded, 2 * length - 1 - folded)
        total += weight * tl.load(maps + line + folded.to(tl.int64) * step, mask=valid, other=0.0)
        weights += weight
    tl.store(smoothed + index, total / weights, mask=valid)


# The key does not tell branches apart: launches that ADD, which must not be repeated, follow one of the same key.
DISTANCES = Tuned(distances_kernel, {"any": BLOCKS}, key=("channels", "channel_stride", "problem"))
# It changes what it reads where there are more than four levels, so that it has one configuration.
FUSED = Tuned(fused_map_kernel, {"any": (config(4, BLOCK=256),)}, key=())
SMOOTH = Tuned(smooth_kernel, {"any": (config(4, BLOCK=256),)}, key=())


@operator
def cosine_anomaly_map(a: Arguments) -> Tensor:
    """See :func:`bkd_fast.ops.cosine_anomaly_map`."""
    distances, _ = _distances(Levels(a.teacher, a.student), a, statistics=False)
    output = floats((a.teacher[0].shape[0], *a.size), a.teacher[0])
    count = output.numel()
    if not len(output):
        return output
    fuse, smooth = FUSED(), SMOOTH()
    for start in range(0, len(distances), TOGETHER):
        group = distances[start : start + TOGETHER]
        padded = group + group[-1:] * (TOGETHER - len(group))  # those beyond LEVELS are not read
        shapes = [value for level in padded for value in _scales(level, a.size, a.align_corners)]
        wrap_triton(fuse)[lambda meta: (triton.cdiv(count, meta["BLOCK"]),)](
            *padded, output, count, *a.size, *shapes,
            LEVELS=len(group), PRODUCT=a.fusion == "product", ALIGN=a.align_corners, MORE=start > 0,
        )  # fmt: skip
    radius = int(4 * a.sigma + 0.5)
    if a.sigma == 0:
        return output
    columns = floats(output.shape, output)
    for source, target, length, step in ((output, columns, a.size[0], a.size[1]), (columns, output, a.size[1], 1)):
        wrap_triton(smooth)[lambda meta: (triton.cdiv(count, meta["BLOCK"]),)](
            source, target, count, length, step, a.sigma, radius
        )
    return output


@operator
def cosine_anomaly_map_backward(grad: Tensor, a: Arguments, needs: Sequence[bool]) -> list[Tensor]:
    """Return the gradients with respect to all tensors; empty where ``needs`` is False.

    The kernels read the features; the steps from the distances to the map are small and left to PyTorch.
    """
    levels, count = Levels(a.teacher, a.student), len(a.teacher)
    distances, statistics = _distances(levels, a, statistics=True)
    grad_distance = reference.fusion_backward(grad, distances, a)
    flat = [grad_distance[index % count].reshape(-1).contiguous() for index in range(len(a.student))]
    directions = [(1 - a.value_share) * weight for weight in a.weights]
    values = [a.value_share * weight / levels.channels[index % count] for index, weight in enumerate(a.weights)]
    return pair_gradients(levels, flat, statistics, directions, values, False, needs, [*a.teacher, *a.student])


def _distances(levels: Levels, a: Arguments, *, statistics: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Return the distances (N, H, W) of each level to the power of its exponent.

    With ``statistics``, for gradients: not raised, and the sums (3, N H W) of each student level.
    """
    count = len(levels.teacher)
    exponents = [1.0] * count if statistics else a.exponents
    distances = [floats((len(t), *t.shape[2:]), t) for t in levels.teacher]
    sums = [floats((3, distances[index % count].numel() if statistics else 0), t) for index, t in
            enumerate(levels.student)]  # fmt: skip
    kernel = DISTANCES()
    for index, teacher in enumerate(levels.teacher):
        own_sizes = sizes(levels, index)
        pixels = own_sizes[0]
        own = list(range(index, len(levels.student), count))
        for start in range(0, len(own) if len(teacher) else 0, 2):
            first, second = own[start], own[min(start + 1, len(own) - 1)]
            wrap_triton(kernel)[lambda meta, pixels=pixels: (triton.cdiv(pixels, meta["BLOCK_P"]),)](
                teacher, levels.student[first], levels.student[second], distances[index], sums[first], sums[second],
                *own_sizes, 1 - a.value_share, a.value_share / levels.channels[index], a.weights[first],
                a.weights[second], exponents[index], bucket(pixels),
                TWO=first != second, ADD=start > 0, RAISE=exponents[index] != 1 and start + 2 >= len(own),
                SUMS=statistics,
                **layout(levels, index),
            )  # fmt: skip
    return distances, sums


def _scales(level: Tensor, size: Sequence[int], align_corners: bool) -> list[float]:
    """Return height and width of a level, and its steps for one step on the map, down and to the right."""
    inner = level.shape[1:]
    if align_corners:
        steps = [(own - 1) / (whole - 1) if whole > 1 else 0.0 for own, whole in zip(inner, size, strict=True)]
    else:
        steps = [own / whole for own, whole in zip(inner, size, strict=True)]
    return [*inner, *steps]
