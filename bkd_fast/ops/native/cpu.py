"""The operators on the CPU kernels: lays arguments out as the kernels take them, and gives them results to fill in.

The kernels compute in float32 or float64; float16 and bfloat16 are converted. They read images channels-last.
BKD_FAST_SIMD chooses an instruction set (see :func:`simd_tiers`); without it the best that this machine has is taken.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from bkd_fast.ops import reference
from bkd_fast.ops.checks import check_shots
from bkd_fast.ops.registration import memory_format

SIMD = "BKD_FAST_SIMD"
IMAGE_BYTES = 3 * 2**20  # of input that is converted to channels-last at a time, for each thread

_native = torch.ops.bkd_fast_native


@cache
def simd_tiers() -> tuple[str, ...]:
    """The instruction sets that are compiled in and that this machine has, the slowest first."""
    return tuple(_native.cpu_tiers().split())


def simd_tier() -> str:
    """The instruction set in use.

    Raises:
        RuntimeError: BKD_FAST_SIMD names one that is not there.
    """
    return simd_tiers()[_tier()]


def _tier() -> int:
    chosen = os.environ.get(SIMD)
    if not chosen:
        return len(simd_tiers()) - 1
    if chosen not in simd_tiers():
        raise RuntimeError(f"{SIMD} is {chosen!r}, expected one of {', '.join(simd_tiers())} on this machine")
    return simd_tiers().index(chosen)


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
    shape = (input.shape[0], weight.shape[0], *offset.shape[2:])
    output = torch.empty(shape, dtype=_wide(input), device=input.device, memory_format=memory_format(input))
    kernel, shift = _dense(weight), _optional(bias)
    # A channels-last input is read where it lies; others are converted part after part, in the same room.
    image = max(1, input[:1].numel() * output.element_size())
    converted = _wide(input) != input.dtype or memory_format(input) != torch.channels_last
    step = max(1, IMAGE_BYTES * torch.get_num_threads() // image if converted else shape[0])
    held = (min(step, shape[0]) if converted else 0, *input.shape[1:])
    room = torch.empty(held, dtype=output.dtype, memory_format=torch.channels_last)
    for start in range(0, shape[0], step):
        part = slice(start, start + step)
        images = input[part]
        if converted:
            images = room[: len(images)].copy_(images)
        _native.deform_conv(
            _tier(), images, _dense(offset[part]), None if mask is None else _dense(mask[part]), kernel, shift,
            stride, padding, dilation, output[part],
        )  # fmt: skip
    return output.to(input.dtype)


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
    by_input = _zeros_last(input, needs[0])
    by_offset, by_weight = _empty(offset, needs[1]), _empty(weight, needs[2])
    by_mask = _empty(grad if mask is None else mask, needs[4])
    if needs[0] or needs[1] or needs[2] or needs[4]:
        _native.deform_conv_backward(
            _tier(), _dense(grad, memory_format(grad)), _last(input), _dense(offset),
            _optional(mask), _dense(weight), stride, padding, dilation, by_input, by_offset,
            by_mask, by_weight,
        )  # fmt: skip
    by_bias = grad.sum((0, 2, 3), dtype=_wide(grad)) if needs[3] else grad.new_empty(0)
    return (
        by_input.to(input.dtype),
        by_offset.to(offset.dtype),
        by_weight.to(weight.dtype),
        by_bias.to(grad.dtype),
        by_mask.to((grad if mask is None else mask).dtype),
    )


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
    channels = 2 * projected.shape[1] // offset.shape[1]
    output = torch.empty(
        (offset.shape[0], channels, *offset.shape[2:]), dtype=_wide(projected), memory_format=torch.channels_last
    )
    _native.deform_gather(
        _tier(), _last(projected), _dense(offset), _optional(mask), kernel_size, stride, padding,
        dilation, output,
    )  # fmt: skip
    return output.to(projected.dtype)


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
    by_projected = _zeros_last(projected, needs[0])
    by_offset = _empty(offset, needs[1])
    by_mask = _empty(grad if mask is None else mask, needs[2])
    _native.deform_gather_backward(
        _tier(), _last(grad), _last(projected), _dense(offset), _optional(mask), kernel_size,
        stride, padding, dilation, by_projected, by_offset, by_mask,
    )  # fmt: skip
    return (
        by_projected.to(projected.dtype),
        by_offset.to(offset.dtype),
        by_mask.to((grad if mask is None else mask).dtype),
    )


def sparse_memory_attention(
    query: Tensor, memory: Tensor, threshold: float, temperature: float, renormalize: bool
) -> Tensor:
    """See :func:`bkd_fast.ops.sparse_memory_attention`."""
    rows = _dense(query)
    output = torch.empty(rows.shape, dtype=rows.dtype)
    _native.memory_attention(_tier(), rows, _dense(memory), threshold, temperature, renormalize, output)
    return output.to(query.dtype)


def sparse_memory_attention_backward(
    grad: Tensor,
    query: Tensor,
    memory: Tensor,
    threshold: float,
    temperature: float,
    renormalize: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """Gradients by query and memory; empty tensors where ``needs`` says so."""
    by_query = _empty(query, needs[0])
    by_memory = torch.zeros(memory.shape if needs[1] else 0, dtype=_wide(memory))
    _native.memory_attention_backward(
        _tier(), _dense(grad), _dense(query), _dense(memory), threshold, temperature, renormalize, by_query, by_memory
    )
    return by_query.to(query.dtype), by_memory.to(memory.dtype)


def cosine_anomaly_map(
    teacher: Sequence[Tensor],
    student: Sequence[Tensor],
    size: Sequence[int],
    fusion: str,
    sigma: float,
    weights: Sequence[float],
    exponents: Sequence[float],
    align_corners: bool,
    value_share: float,
) -> Tensor:
    """See :func:`bkd_fast.ops.cosine_anomaly_map`."""
    teacher, student = _pairs(teacher, student)
    output = torch.empty((teacher[0].shape[0], *size), dtype=teacher[0].dtype)
    _native.anomaly_map(
        _tier(), teacher, student, list(weights), list(exponents), value_share, fusion == "product", sigma,
        align_corners, output,
    )  # fmt: skip
    return output


def cosine_anomaly_map_backward(
    grad: Tensor,
    teacher: Sequence[Tensor],
    student: Sequence[Tensor],
    size: Sequence[int],
    fusion: str,
    sigma: float,
    weights: Sequence[float],
    exponents: Sequence[float],
    align_corners: bool,
    value_share: float,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients by the teacher's levels, then the students'; empty tensors where ``needs`` says so.

    The kernels read the features; what lies between the distances and the map is small and left to PyTorch.
    """
    tensors = [*teacher, *student]
    teacher, student = _pairs(teacher, student)
    places = [level.shape[:1] + level.shape[2:] for level in teacher]
    counts = [place.numel() for place in places]
    distances = torch.empty(sum(counts), dtype=teacher[0].dtype)
    _native.cosine_distances(_tier(), teacher, student, list(weights), value_share, distances)
    levels = [part.view(place) for part, place in zip(distances.split(counts), places, strict=True)]
    by_level = reference.fusion_backward(
        grad.to(distances.dtype), levels, size, fusion, sigma, exponents, align_corners
    )
    by_distance = torch.cat([part.reshape(-1) for part in by_level])
    found = _like([*teacher, *student], needs)
    _native.cosine_distances_backward(
        _tier(), by_distance, teacher, student, list(weights), value_share, found[: len(teacher)], found[len(teacher) :]
    )
    return [value.to(tensor.dtype) for value, tensor in zip(found, tensors, strict=True)]


def distillation_loss(
    teacher: Sequence[Tensor], student: Sequence[Tensor], direction: str, value_weight: float
) -> tuple[Tensor, Tensor]:
    """See :func:`bkd_fast.ops.distillation_loss`; also the statistics that the reference describes."""
    by_pixel = direction == "pixel"
    teacher, student = _pairs(teacher, student)
    vectors = sum(level.shape[0] * (level.shape[2:].numel() if by_pixel else 1) for level in teacher)
    statistics = torch.empty(3 * vectors, dtype=teacher[0].dtype)
    output = torch.empty((), dtype=teacher[0].dtype)
    _native.distillation_loss(_tier(), teacher, student, by_pixel, value_weight, statistics, output)
    return output, statistics


def distillation_loss_backward(
    grad: Tensor,
    teacher: Sequence[Tensor],
    student: Sequence[Tensor],
    statistics: Tensor,
    direction: str,
    value_weight: float,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients by the teacher's levels, then the student's; empty tensors where ``needs`` says so."""
    tensors = [*teacher, *student]
    teacher, student = _pairs(teacher, student)
    found = _like([*teacher, *student], needs)
    _native.distillation_loss_backward(
        _tier(), _dense(grad), teacher, student, statistics, direction == "pixel", value_weight,
        found[: len(teacher)], found[len(teacher) :],
    )  # fmt: skip
    return [value.to(tensor.dtype) for value, tensor in zip(found, tensors, strict=True)]


def local_match(query: Tensor, support: Tensor, shots: Tensor, radius: int) -> tuple[Tensor, Tensor]:
    """See :func:`bkd_fast.ops.local_match`. A half-precision support is converted by the kernel, row after row."""
    check_shots("local_match", shots, len(support))
    dtype, size = _wide(query), query.shape[2:]
    distance = torch.empty((*shots.shape, *size), dtype=dtype)
    displacement = torch.empty((*shots.shape, 2, *size), dtype=dtype)
    images = support.contiguous(memory_format=torch.channels_last)
    _native.local_match(_tier(), _last(query), images, shots.contiguous(), radius, distance, displacement)
    return distance, displacement


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _dense(tensor: Tensor, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    wide = _wide(tensor)
    converted = tensor if tensor.dtype == wide else tensor.to(wide)
    return converted.contiguous(memory_format=layout)


def _optional(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else _dense(tensor)


def _last(tensor: Tensor) -> Tensor:
    return _dense(tensor, torch.channels_last)


def _zeros_last(like: Tensor, needed: bool) -> Tensor:
    """Zeros that a kernel adds to, channels-last; no elements where they are not needed."""
    if not needed:
        return torch.empty(0, dtype=_wide(like))
    return torch.empty(like.shape, dtype=_wide(like), memory_format=torch.channels_last).zero_()


def _empty(like: Tensor, needed: bool) -> Tensor:
    return torch.empty(like.shape if needed else 0, dtype=_wide(like))


def _pairs(teacher: Sequence[Tensor], student: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Dense levels; those of a student laid out as the teacher's."""
    laid_out = [_dense(level, memory_format(level)) for level in teacher]
    others = [_dense(level, memory_format(laid_out[index % len(laid_out)])) for index, level in enumerate(student)]
    return laid_out, others


def _like(dense: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor]:
    """Room for gradients, laid out as the dense levels; none where it is not needed."""
    return [
        torch.empty_like(level) if need else torch.empty(0, dtype=level.dtype)
        for level, need in zip(dense, needs, strict=True)
    ]
