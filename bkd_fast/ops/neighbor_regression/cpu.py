"""Rows as combinations of their neighbours on a CPU kernel (csrc/cpu/neighbor_regression.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from bkd_fast.ops.checks import check_indices
from bkd_fast.ops.cpu_common import dense, kernels, tier
from bkd_fast.ops.neighbor_regression import Arguments
from bkd_fast.ops.registration import wide


def neighbor_regression(a: Arguments) -> Tensor:
    """See :func:`bkd_fast.ops.neighbor_regression`. The kernel converts a half-precision bank, row after row."""
    check_indices("neighbor_regression", "neighbors", a.neighbors, len(a.bank), "the rows of bank")
    output = torch.empty(a.query.shape, dtype=wide(a.query))
    bank = a.bank.contiguous()
    kernels.neighbor_regression(tier(), dense(a.query), bank, a.neighbors.contiguous(), a.ridge, output)
    return output
