"""The template of an operator, complete on every backend: copy this folder to add one."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from bkd_fast.ops.checks import check_tensors, check_types
from bkd_fast.ops.registration import Result, memory_format, register

__all__ = ["scaled_copy"]


class Arguments(NamedTuple):
    """The operator's arguments, as its schema and every backend have them."""

    input: Tensor
    scale: float


def scaled_copy(input: Tensor, scale: float = 1.0) -> Tensor:
    """Return ``scale * input``.

    Args:
        input: of any shape.
        scale: a finite number.

    Returns:
        A new tensor in the shape and dtype of ``input``, channels_last where ``input`` is.

    Raises:
        TypeError, ValueError: the message names the argument, what was given and what was expected.
        RuntimeError: forward-mode or second derivatives.
    """
    check_types(_NAME, {"input": input})
    return _operator(input, float(scale))


def _check(a: Arguments) -> None:
    check_tensors(_NAME, {"input": a.input})
    if not -float("inf") < a.scale < float("inf"):
        raise ValueError(f"{_NAME}: scale is {a.scale}, expected a finite number")


def _results(a: Arguments) -> list[Result]:
    return [Result(a.input.shape, a.input.dtype, memory_format(a.input))]


_NAME = "scaled_copy"
_operator = register(_NAME, Arguments, check=_check, results=_results)
