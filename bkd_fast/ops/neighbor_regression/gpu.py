"""The arguments of the GPU kernels: rows of whole chunks, the query in float32."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from bkd_fast.ops.layout import floats, whole_chunks
from bkd_fast.ops.neighbor_regression import Arguments


def rows_and_bank(a: Arguments) -> tuple[Tensor, Tensor]:
    """Return query and bank with zeros up to whole chunks of the bank.

    A contiguous bank of whole chunks is not copied.
    """
    bank = whole_chunks(a.bank, 1, a.bank.shape[1]).contiguous()
    missing = bank.shape[1] - a.query.shape[1]
    query = (F.pad(a.query.float(), [0, missing]) if missing else a.query.float()).contiguous()
    return query, bank


def regression_arguments(a: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Return what :func:`rows_and_bank` does, and a buffer for the result."""
    query, bank = rows_and_bank(a)
    return query, bank, floats(query.shape, query)
