"""The nearest rows in plain PyTorch: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from bkd_fast.ops.nearest_rows import Arguments
from bkd_fast.ops.registration import wide


def nearest_rows(a: Arguments) -> Tensor:
    """See :func:`bkd_fast.ops.nearest_rows`."""
    dtype = wide(a.query)
    return nearest(a.query.to(dtype), a.bank.to(dtype), a.nearest, half_squares=a.half_squares)


def nearest(
    query: Tensor, bank: Tensor, count: int, exclude: Tensor | None = None, half_squares: Tensor | None = None
) -> Tensor:
    """Return the same; ``exclude`` (R, M) bool are rows that a query must not choose."""
    # Largest where the squared distance is smallest: the query's own square is the same for all rows.
    if half_squares is None:
        similarity = torch.addmm(bank.square().sum(1), query, bank.T, beta=-0.5)
    else:
        similarity = torch.addmm(half_squares, query, bank.T, beta=-1)
    if exclude is not None:
        similarity = similarity.masked_fill(exclude, -torch.inf)
    return similarity.topk(count, dim=1).indices
