"""Rows as the least-squares combination of a few neighbours."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from bkd_fast.ops.checks import check_index, check_index_tensor, check_shape, check_tensors, check_types
from bkd_fast.ops.registration import Result, no_gradient, register, wide

__all__ = ["neighbor_regression"]

MAX_NEIGHBORS = 64
RIDGE = 0.3


class Arguments(NamedTuple):
    """The operator's arguments, as its schema and every backend have them."""

    query: Tensor
    bank: Tensor
    neighbors: Tensor
    ridge: float


def neighbor_regression(query: Tensor, bank: Tensor, neighbors: Tensor, ridge: float = RIDGE) -> Tensor:
    """Return each row of ``query`` as the best combination of its neighbours, rows of ``bank``.

    The weights sum to one and minimise the squared distance to the row plus a ridge, the weights of locally linear
    embedding (Roweis and Saul, Science 2000): with differences ``d_j = bank[neighbors[r, j]] - query[r]``, their Gram
    matrix ``G`` and its mean diagonal ``g``, they are ``(G / g + ridge I)^-1 1``, divided by their sum. The larger the
    ridge, the closer they are to the plain mean's.

    Arithmetic is float32 for half precision. There is no gradient: calling backward raises RuntimeError;
    :func:`bkd_fast.ops.neighbor_regression.reference.regression_weights` is plain PyTorch and has one.

    Args:
        query: (R, C).
        bank: (M, C), may be of another dtype, float16 for instance.
        neighbors: (R, K) int64, 0 to M - 1, K from 1 to 64. On the CPU they are checked. On other devices, where a
            check would have to wait, a row that does not exist is never read: the result is NaN.
        ridge: 1e-6 to 1e6, in units of the mean squared distance of the neighbours.

    Returns:
        (R, C), float32, or float64 for a float64 query.

    Raises:
        TypeError, ValueError: the message names the argument, what was given and what was expected.
        IndexError: on the CPU, a neighbour that is no row of the bank.
        RuntimeError: in backward.
    """
    check_types(_NAME, {"query": query, "bank": bank, "neighbors": neighbors})
    return _operator(query, bank, neighbors, float(ridge))


def check_regression(name: str, a: Arguments) -> None:
    """Check the arguments of an operator ``name`` that has these."""
    check_tensors(name, {"query": a.query, "bank": a.bank})
    check_shape(name, "query", a.query, ("R", "C"))
    if not a.query.shape[1]:
        raise ValueError(f"{name}: query has shape {tuple(a.query.shape)}, expected at least one channel")
    check_shape(name, "bank", a.bank, ("M", a.query.shape[1]))
    check_index_tensor(name, "neighbors", a.neighbors, "query", a.query)
    check_shape(name, "neighbors", a.neighbors, (a.query.shape[0], "K"))
    if not 1 <= a.neighbors.shape[1] <= MAX_NEIGHBORS:
        raise ValueError(
            f"{name}: neighbors has shape {tuple(a.neighbors.shape)}, expected 1 to {MAX_NEIGHBORS} neighbors a row"
        )
    if not 1e-6 <= a.ridge <= 1e6:
        raise ValueError(f"{name}: ridge is {a.ridge!r}, expected a number from 1e-6 to 1e6")
    check_index(name, "query", a.query.shape[:1])
    check_index(name, "bank", a.bank.shape[:1])


def _check(a: Arguments) -> None:
    check_regression(_NAME, a)


def _results(a: Arguments) -> list[Result]:
    return [Result(a.query.shape, wide(a.query))]


_NAME = "neighbor_regression"
_operator = register(
    _NAME, Arguments, check=_check, results=_results,
    gradient=no_gradient(_NAME),
)  # fmt: skip
