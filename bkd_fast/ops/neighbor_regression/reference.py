"""Rows as combinations of their neighbours in plain PyTorch: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from bkd_fast.ops.checks import check_indices
from bkd_fast.ops.neighbor_regression import RIDGE, Arguments
from bkd_fast.ops.registration import wide


def neighbor_regression(a: Arguments) -> Tensor:
    """See :func:`bkd_fast.ops.neighbor_regression`."""
    if a.neighbors.device.type == "cpu":
        check_indices("neighbor_regression", "neighbors", a.neighbors, len(a.bank), "the rows of bank")
        return combined(*a)
    exists = (a.neighbors >= 0) & (a.neighbors < len(a.bank))
    bank = a.bank if len(a.bank) else a.bank.new_zeros(1, a.bank.shape[1])
    result = combined(a.query, bank, a.neighbors.clamp(0, len(bank) - 1), a.ridge)
    return result.masked_fill(~exists.all(1, keepdim=True), torch.nan)


def combined(query: Tensor, bank: Tensor, neighbors: Tensor, ridge: float) -> Tensor:
    """Return the same for neighbours that are known to be rows of the bank."""
    dtype = wide(query)
    rows = bank[neighbors].to(dtype)
    return (regression_weights(query.to(dtype), rows, ridge).unsqueeze(1) @ rows).squeeze(1)


def regression_weights(query: Tensor, neighbors: Tensor, ridge: float = RIDGE) -> Tensor:
    """Return the weights (N, k) that combine k neighbours (N, k, D) of a query (N, D); differentiable."""
    apart = neighbors - query.unsqueeze(1)
    gram = apart @ apart.transpose(1, 2)
    scale = gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-12)
    gram = gram / scale[:, None, None] + ridge * torch.eye(neighbors.shape[1], dtype=gram.dtype, device=gram.device)
    weights = _solved(gram)
    return weights / weights.sum(1, keepdim=True)


def _solved(gram: Tensor) -> Tensor:
    """Return gram^-1 1 for symmetric positive definite (N, k, k), by Gauss-Jordan elimination, which needs no pivoting.

    In operations that any run-time has, none of them in place.
    """
    count = gram.shape[1]
    right = torch.ones_like(gram[:, :, 0])
    others = 1 - torch.eye(count, dtype=gram.dtype, device=gram.device)
    for step in range(count):
        factor = gram[:, :, step] / gram[:, step, step].unsqueeze(1) * others[step]
        right = right - factor * right[:, step].unsqueeze(1)
        gram = gram - factor.unsqueeze(2) * gram[:, step].unsqueeze(1)
    return right / gram.diagonal(dim1=1, dim2=2)
