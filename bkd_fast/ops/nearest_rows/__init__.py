"""The rows of a bank that are nearest to each query."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bkd_fast.ops.checks import check_index, check_shape, check_tensors, check_types
from bkd_fast.ops.registration import Result, register

__all__ = ["nearest_rows"]

MAX_NEAREST = 64


class Arguments(NamedTuple):
    """The operator's arguments, as its schema and every backend have them."""

    query: Tensor
    bank: Tensor
    nearest: int


def nearest_rows(query: Tensor, bank: Tensor, nearest: int) -> Tensor:
    """Return the indices of the rows of ``bank`` with the smallest squared distance to each row of ``query``.

    Exact within the rounding of float32, or of float64 for float64 rows. Where the CPU multiplies bfloat16 fast,
    rounded products choose candidates by a bound that no true neighbour misses, and exact products decide among these.
    Which rows a query that is not finite chooses is not specified. There is no gradient.

    Args:
        query: (R, C).
        bank: (M, C), in the dtype of ``query``.
        nearest: how many, from 1 to M, at most 64.

    Returns:
        (R, nearest) int64, the nearest first.

    Raises:
        TypeError, ValueError: the message names the argument, what was given and what was expected.
        RuntimeError: in backward.
    """
    check_types(_NAME, {"query": query, "bank": bank})
    if not isinstance(nearest, int) or isinstance(nearest, bool):
        raise ValueError(f"{_NAME}: nearest is {nearest!r}, expected an integer from 1 to {MAX_NEAREST}")
    return _operator(query, bank, nearest)


def _check(a: Arguments) -> None:
    check_tensors(_NAME, {"query": a.query, "bank": a.bank})
    check_shape(_NAME, "query", a.query, ("R", "C"))
    if not a.query.shape[1]:
        raise ValueError(f"{_NAME}: query has shape {tuple(a.query.shape)}, expected at least one channel")
    check_shape(_NAME, "bank", a.bank, ("M", a.query.shape[1]))
    if a.bank.dtype != a.query.dtype:
        raise TypeError(f"{_NAME}: bank is {a.bank.dtype} and query is {a.query.dtype}; convert one of them")
    if not 1 <= a.nearest <= min(a.bank.shape[0], MAX_NEAREST):
        limit = min(a.bank.shape[0], MAX_NEAREST)
        raise ValueError(f"{_NAME}: nearest is {a.nearest!r}, expected an integer from 1 to {limit}")
    check_index(_NAME, "query", a.query.shape[:1])
    check_index(_NAME, "bank", a.bank.shape[:1])


def _results(a: Arguments) -> list[Result]:
    return [Result((a.query.shape[0], a.nearest), torch.int64)]


_NAME = "nearest_rows"
_operator = register(
    _NAME, Arguments, check=_check, results=_results, gradient="nearest_rows has no gradient: its results are indices"
)
