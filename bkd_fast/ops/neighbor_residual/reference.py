"""The distance of rows from the combination of their neighbours in plain PyTorch: the specification."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bkd_fast.ops.neighbor_regression import reference
from bkd_fast.ops.neighbor_residual import Arguments
from bkd_fast.ops.registration import wide


def neighbor_residual(a: Arguments) -> tuple[Tensor, Tensor]:
    """See :func:`bkd_fast.ops.neighbor_residual`."""
    result = distance(a.query, reference.neighbor_regression(a.regression))
    values = a.values.to(wide(a.values))
    if a.neighbors.device.type == "cpu":
        return result, mean_values(values, a.neighbors)
    exists = ((a.neighbors >= 0) & (a.neighbors < len(values))).all(1, keepdim=True)
    values = values if len(values) else values.new_zeros(1, values.shape[1])
    means = mean_values(values, a.neighbors.clamp(0, len(values) - 1))
    return result, means.masked_fill(~exists, torch.nan)


def apart(query: Tensor, bank: Tensor, neighbors: Tensor, values: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Return the same for neighbours that are known to be rows of the bank; the arguments one by one."""
    return distance(query, reference.combined(query, bank, neighbors, ridge)), mean_values(values, neighbors)


def distance(query: Tensor, combined: Tensor) -> Tensor:
    """Return the mean squared difference of rows (R, C): (R,)."""
    return F.mse_loss(combined, query.to(combined.dtype), reduction="none").mean(1)


def mean_values(values: Tensor, neighbors: Tensor) -> Tensor:
    """Return the means (R, V) of values (M, V) over neighbours (R, K)."""
    return values[neighbors].mean(1)
