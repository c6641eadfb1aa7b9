"""Bias, shortcut and activation of a convolution in one pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bkd_fast.ops.checks import check_index, check_shape, check_tensors, check_types
from bkd_fast.ops.registration import Result, no_gradient, register

__all__ = ["bias_activation"]

INFINITY = float("inf")


class Arguments(NamedTuple):
    """The operator's arguments, as its schema and every backend have them."""

    x: Tensor
    bias: Tensor
    residual: Tensor | None
    low: float
    high: float


def bias_activation(
    x: Tensor, bias: Tensor, residual: Tensor | None = None, low: float = 0.0, high: float = INFINITY
) -> Tensor:
    """Return ``clamp(x + bias + residual, low, high)``, what follows a convolution in a frozen network.

    ReLU is 0 to infinity, ReLU6 is 0 to 6, no activation is -infinity to infinity. Arithmetic is float32 for half
    precision, rounded once at the end; NaN stays NaN. There is no gradient: calling backward raises RuntimeError.

    Args:
        x: (N, C, H, W).
        bias: (C,), added to each channel; of the dtype of ``x``.
        residual: (N, C, H, W), of the dtype of ``x``; None adds nothing.
        low: the least value of the result; -infinity for no limit.
        high: the largest value of the result, at least ``low``.

    Returns:
        (N, C, H, W) in the dtype of ``x``, channels_last where the channels of ``x`` are adjacent in memory.

    Raises:
        TypeError, ValueError: the message names the argument, what was given and what was expected.
        RuntimeError: in backward.
    """
    check_types(_NAME, {"x": x, "bias": bias}, {"residual": residual})
    return _operator(x, bias, residual, float(low), float(high))


def layout_of(x: Tensor) -> torch.memory_format:
    """Return the layout of the result; that of a channels_last image holds for a slice of it too."""
    return torch.channels_last if x.stride(1) == 1 and not x.is_contiguous() else torch.contiguous_format


def _check(a: Arguments) -> None:
    check_tensors(_NAME, {"x": a.x, "bias": a.bias}, {"residual": a.residual})
    check_shape(_NAME, "x", a.x, ("N", "C", "H", "W"))
    check_shape(_NAME, "bias", a.bias, (a.x.shape[1],))
    if a.residual is not None:
        check_shape(_NAME, "residual", a.residual, tuple(a.x.shape))
    for name, tensor in (("bias", a.bias), ("residual", a.residual)):
        if tensor is not None and tensor.dtype != a.x.dtype:
            raise TypeError(f"{_NAME}: {name} is {tensor.dtype}, expected {a.x.dtype}, the dtype of x")
    if not a.low <= a.high:
        raise ValueError(f"{_NAME}: low is {a.low} and high is {a.high}, expected two numbers, low at most high")
    check_index(_NAME, "an image", a.x.shape[1:])


def _results(a: Arguments) -> list[Result]:
    return [Result(a.x.shape, a.x.dtype, layout_of(a.x))]


_NAME = "bias_activation"
_operator = register(
    _NAME, Arguments, check=_check, results=_results,
    gradient=no_gradient(_NAME),
)  # fmt: skip
