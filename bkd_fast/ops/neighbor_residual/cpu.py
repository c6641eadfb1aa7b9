"""The distance of rows from the combination of their neighbours, which a CPU kernel makes."""

from __future__ import annotations

from torch import Tensor

from bkd_fast.ops.neighbor_regression.cpu import neighbor_regression
from bkd_fast.ops.neighbor_residual import Arguments
from bkd_fast.ops.neighbor_residual.reference import distance, mean_values
from bkd_fast.ops.registration import wide


def neighbor_residual(a: Arguments) -> tuple[Tensor, Tensor]:
    """See :func:`bkd_fast.ops.neighbor_residual`."""
    result = distance(a.query, neighbor_regression(a.regression))
    return result, mean_values(a.values.to(wide(a.values)), a.neighbors)
