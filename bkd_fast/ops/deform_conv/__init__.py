"""Modulated deformable convolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from bkd_fast.ops.checks import check_shape, check_tensors, check_types, output_size, pair
from bkd_fast.ops.registration import Result, memory_format, register

__all__ = ["modulated_deform_conv2d"]


class Arguments(NamedTuple):
    """The operator's arguments, as its schema and every backend have them."""

    input: Tensor
    offset: Tensor
    weight: Tensor
    bias: Tensor | None
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    mask: Tensor | None


def modulated_deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    mask: Tensor | None = None,
) -> Tensor:
    """Deformable convolution v2 (Zhu et al. 2019; BKD Eq. 2 and 5), a drop-in for ``torchvision.ops.deform_conv2d``.

    Each tap of the kernel samples the input bilinearly at its regular position plus an offset, and is scaled by its
    mask. Samples outside the image are zero, and so is the part of a border sample that reaches outside. Positions and
    sums are float32 for half-precision input. A NaN offset gives a NaN output and reads nothing outside the image
    (torchvision converts it to an integer, which is undefined).

    Args:
        input: (N, C, H, W).
        offset: (N, 2 G K, Ho, Wo), (y, x) per tap in input pixels; K = kh kw, G offset groups of channels, read
            off the shape.
        weight: (O, C / groups, kh, kw); groups are read off the shape.
        bias: (O,) or None.
        stride, padding, dilation: an integer or a (vertical, horizontal) pair.
        mask: (N, G K, Ho, Wo), the modulation; None = all ones.

    Returns:
        (N, O, Ho, Wo) in the dtype of ``input``, channels_last where ``input`` is.

    Raises:
        TypeError, ValueError: the message names the argument, what was given and what was expected.
        RuntimeError: forward-mode or second derivatives.
    """
    check_types(_NAME, {"input": input, "offset": offset, "weight": weight}, {"bias": bias, "mask": mask})
    return _operator(
        input, offset, weight, bias, pair(_NAME, "stride", stride, 1), pair(_NAME, "padding", padding, 0),
        pair(_NAME, "dilation", dilation, 1), mask,
    )  # fmt: skip


def _check(a: Arguments) -> None:
    check_tensors(_NAME, {"input": a.input, "offset": a.offset, "weight": a.weight}, {"bias": a.bias, "mask": a.mask})
    check_shape(_NAME, "input", a.input, ("N", "C", "H", "W"))
    check_shape(_NAME, "weight", a.weight, ("O", "C / groups", "kh", "kw"))
    if 0 in a.weight.shape:
        raise ValueError(f"{_NAME}: weight has shape {tuple(a.weight.shape)}, expected no size 0")
    channels, outputs, part = a.input.shape[1], a.weight.shape[0], a.weight.shape[1]
    if not channels or channels % part or outputs % (channels // part):
        raise ValueError(
            f"{_NAME}: weight has shape {tuple(a.weight.shape)} and input {channels} channels; expected "
            "weight.shape[1] to divide the input's channels into groups, and the groups to divide weight.shape[0]"
        )
    rows, columns = output_size(_NAME, a.input, list(a.weight.shape[2:]), a.stride, a.padding, a.dilation)
    taps = a.weight.shape[2] * a.weight.shape[3]
    check_shape(_NAME, "offset", a.offset, (a.input.shape[0], "2 * offset groups * kh * kw", rows, columns))
    groups = a.offset.shape[1] // (2 * taps)
    if not groups or a.offset.shape[1] % (2 * taps) or channels % groups:
        raise ValueError(
            f"{_NAME}: offset has {a.offset.shape[1]} channels, expected 2 * G * {taps} with a number of offset groups "
            f"G that divides the input's {channels} channels"
        )
    if a.mask is not None:
        check_shape(_NAME, "mask", a.mask, (a.input.shape[0], groups * taps, rows, columns))
    if a.bias is not None:
        check_shape(_NAME, "bias", a.bias, (outputs,))


def _results(a: Arguments) -> list[Result]:
    shape = (a.input.shape[0], a.weight.shape[0], *a.offset.shape[2:])
    return [Result(shape, a.input.dtype, memory_format(a.input))]


_NAME = "modulated_deform_conv2d"
_operator = register(_NAME, Arguments, check=_check, results=_results)
