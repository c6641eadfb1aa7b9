"""The distance of rows from the least-squares combination of a few neighbours."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from bkd_fast.ops.checks import check_shape, check_tensors, check_types
from bkd_fast.ops.neighbor_regression import RIDGE, check_regression
from bkd_fast.ops.neighbor_regression import Arguments as Regression
from bkd_fast.ops.registration import Result, no_gradient, register, wide

__all__ = ["neighbor_residual"]


class Arguments(NamedTuple):
    """The operator's arguments, as its schema and every backend have them."""

    query: Tensor
    bank: Tensor
    neighbors: Tensor
    values: Tensor
    ridge: float

    @property
    def regression(self) -> Regression:
        """The arguments of ``neighbor_regression``."""
        return Regression(self.query, self.bank, self.neighbors, self.ridge)


def neighbor_residual(
    query: Tensor, bank: Tensor, neighbors: Tensor, values: Tensor, ridge: float = RIDGE
) -> tuple[Tensor, Tensor]:
    """Return how far each row of ``query`` is from the best combination of its neighbours, and their mean value.

    The combination is that of :func:`bkd_fast.ops.neighbor_regression.neighbor_regression`, and the distance the mean
    squared difference. Arithmetic is float32 for half precision. There is no gradient.

    Args:
        query, bank, neighbors, ridge: as there, (R, C), (M, C) and (R, K).
        values: (M, V), what is known of each row of the bank.

    Returns:
        residual (R,), and means (R, V) of the values of the neighbours, NaN where one is no row of the bank; float32,
        or float64 for a float64 query and float64 values.

    Raises:
        TypeError, ValueError: the message names the argument, what was given and what was expected.
        IndexError: on the CPU, a neighbour that is no row of the bank.
        RuntimeError: in backward.
    """
    check_types(_NAME, {"query": query, "bank": bank, "neighbors": neighbors, "values": values})
    return _operator(query, bank, neighbors, values, float(ridge))


def _check(a: Arguments) -> None:
    check_regression(_NAME, a.regression)
    check_tensors(_NAME, {"query": a.query, "values": a.values})
    check_shape(_NAME, "values", a.values, (a.bank.shape[0], "V"))


def _results(a: Arguments) -> list[Result]:
    rows = a.query.shape[0]
    return [Result((rows,), wide(a.query)), Result((rows, a.values.shape[1]), wide(a.values))]


_NAME = "neighbor_residual"
_operator = register(_NAME, Arguments, check=_check, results=_results, outputs=2, gradient=no_gradient(_NAME))
