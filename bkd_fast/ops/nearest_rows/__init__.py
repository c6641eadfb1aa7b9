"""The rows of a bank that are nearest to each query."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bkd_fast.ops.checks import check_index, check_shape, check_tensors, check_types
from bkd_fast.ops.registration import Result, register, wide

__all__ = ["PreparedRows", "nearest_rows", "prepare_rows"]

MAX_NEAREST = 64


class Arguments(NamedTuple):
    """The operator's arguments, as its schema and every backend have them."""

    query: Tensor
    bank: Tensor
    nearest: int
    half_squares: Tensor | None
    rounded: Tensor | None


class PreparedRows(NamedTuple):
    """A bank with what depends on it alone. It must not change any more.

    ``rows``: (M, C). ``half_squares``: (M,), half the squared norm of each row, float32, or float64 for float64 rows.
    ``rounded``: (M, C), the rows in bfloat16 where they are multiplied so; otherwise None.
    """

    rows: Tensor
    half_squares: Tensor
    rounded: Tensor | None


def prepare_rows(bank: Tensor) -> PreparedRows:
    """Return a bank (M, C) for many calls of :func:`nearest_rows`, whose results keep their bits."""
    rounded = bank.bfloat16() if bank.device.type == "cpu" and rounds(bank) else None
    return PreparedRows(bank, half_squares(bank), rounded)


def half_squares(bank: Tensor) -> Tensor:
    """Return half the squared norm of each row of (M, C)."""
    return bank.to(wide(bank)).square().sum(1).mul_(0.5)


def rounds(bank: Tensor) -> bool:
    """Return whether products with the rows are rounded to bfloat16 on a CPU: where it multiplies that fast."""
    return bank.dtype == torch.float32 and torch.cpu._is_avx512_bf16_supported()


def nearest_rows(query: Tensor, bank: Tensor | PreparedRows, nearest: int) -> Tensor:
    """Return the indices of the rows of ``bank`` with the smallest squared distance to each row of ``query``.

    Exact within the rounding of float32, or of float64 for float64 rows. Where the CPU multiplies bfloat16 fast,
    rounded products choose candidates by a bound that no true neighbour misses, and exact products decide among these.
    Which rows a query that is not finite chooses is not specified. There is no gradient.

    Args:
        query: (R, C).
        bank: (M, C), in the dtype of ``query``; or what :func:`prepare_rows` makes of one that is searched often.
        nearest: how many, from 1 to M, at most 64.

    Returns:
        (R, nearest) int64, the nearest first.

    Raises:
        TypeError, ValueError: the message names the argument, what was given and what was expected.
        RuntimeError: in backward.
    """
    rows, halves, rounded = bank if isinstance(bank, PreparedRows) else (bank, None, None)
    check_types(_NAME, {"query": query, "bank": rows}, {"half_squares": halves, "rounded": rounded})
    if not isinstance(nearest, int) or isinstance(nearest, bool):
        raise ValueError(f"{_NAME}: nearest is {nearest!r}, expected an integer from 1 to {MAX_NEAREST}")
    return _operator(query, rows, nearest, halves, rounded)


def _check(a: Arguments) -> None:
    optional = {"half_squares": a.half_squares, "rounded": a.rounded}
    check_tensors(_NAME, {"query": a.query, "bank": a.bank}, {"half_squares": a.half_squares})
    check_shape(_NAME, "query", a.query, ("R", "C"))
    if not a.query.shape[1]:
        raise ValueError(f"{_NAME}: query has shape {tuple(a.query.shape)}, expected at least one channel")
    check_shape(_NAME, "bank", a.bank, ("M", a.query.shape[1]))
    if a.bank.dtype != a.query.dtype:
        raise TypeError(f"{_NAME}: bank is {a.bank.dtype} and query is {a.query.dtype}; convert one of them")
    expected = {"half_squares": (wide(a.bank), a.bank.shape[:1]), "rounded": (torch.bfloat16, a.bank.shape)}
    for name, value in optional.items():
        if value is None:
            continue
        dtype, shape = expected[name]
        if value.dtype != dtype:
            raise TypeError(f"{_NAME}: {name} is {value.dtype}, expected {dtype}, as prepare_rows makes it")
        check_shape(_NAME, name, value, shape)
        if value.device != a.bank.device:
            raise ValueError(
                f"{_NAME}: {name} is on {value.device} and bank on {a.bank.device}; prepare the bank again"
            )
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
