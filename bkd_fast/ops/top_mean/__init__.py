"""The mean of the largest values of each row."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bkd_fast.ops.checks import check_index, check_shape, check_tensors, check_types
from bkd_fast.ops.registration import Result, register, wide

__all__ = ["top_mean"]


class Arguments(NamedTuple):
    """The operator's arguments, as its schema and every backend have them."""

    values: Tensor
    largest: int


def top_mean(values: Tensor, count: int) -> Tensor:
    """Return the mean of the ``count`` largest values of each row.

    A row with NaN has the result NaN. Arithmetic is float32 for half precision. There is no gradient.

    Args:
        values: (N, P).
        count: how many of them, 1 to P.

    Returns:
        (N,), float32, or float64 for float64 values.

    Raises:
        TypeError, ValueError: the message names the argument, what was given and what was expected.
        RuntimeError: in backward.
    """
    check_types(_NAME, {"values": values})
    if not isinstance(count, int | torch.SymInt) or isinstance(count, bool):
        raise ValueError(f"{_NAME}: count is {count!r}, expected an integer from 1 to the number of values in a row")
    return _operator(values, count)


def _check(a: Arguments) -> None:
    check_tensors(_NAME, {"values": a.values})
    check_shape(_NAME, "values", a.values, ("N", "P"))
    width = a.values.shape[1]
    if not 1 <= a.largest <= width:
        raise ValueError(
            f"{_NAME}: count is {a.largest!r}, expected an integer from 1 to {width}, the number of values in a row"
        )
    check_index(_NAME, "values", a.values.shape)


def _results(a: Arguments) -> list[Result]:
    return [Result(a.values.shape[:1], wide(a.values))]


_NAME = "top_mean"
_operator = register(
    _NAME, Arguments, check=_check, results=_results,
    gradient="top_mean has no gradient; call it under torch.no_grad(), detach its input, or use topk",
)  # fmt: skip
