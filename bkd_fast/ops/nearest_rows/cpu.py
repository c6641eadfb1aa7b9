"""The nearest rows on a CPU kernel (csrc/cpu/nearest_rows.cpp), which is given all products."""

from __future__ import annotations

import torch
from torch import Tensor

from bkd_fast.ops.cpu_common import dense, kernels, tier
from bkd_fast.ops.nearest_rows import Arguments, half_squares, rounds

PRODUCTS = 2**24  # held at a time
FEW = 16  # queries, for which rounding a bank costs more than it saves
# Relative errors: of two rounded factors and a rounded product of bfloat16, with the sums' own; and of float32 sums.
BFLOAT_ERROR = 2.0**-7 + 2.0**-8 + 2.0**-12
FLOAT_ERROR = 2.0**-16


def nearest_rows(a: Arguments) -> Tensor:
    """See :func:`bkd_fast.ops.nearest_rows`."""
    query, bank = dense(a.query), dense(a.bank)
    rounded = rounds(bank) and len(query) >= FEW
    error = BFLOAT_ERROR if rounded else FLOAT_ERROR
    index = torch.empty((len(query), a.nearest), dtype=torch.int64)
    halves = half_squares(bank) if a.half_squares is None else a.half_squares.contiguous()
    columns = bank.T
    if rounded:
        columns = (bank.bfloat16() if a.rounded is None else a.rounded).T
    step = max(1, PRODUCTS // len(bank))
    for start in range(0, len(query), step):
        rows = query[start : start + step]
        products = (rows.bfloat16() if rounded else rows) @ columns
        kernels.nearest_rows(tier(), rows, bank, halves, products, error, index[start : start + step])
    return index
