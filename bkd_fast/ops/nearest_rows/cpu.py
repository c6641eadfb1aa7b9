"""The nearest rows on a CPU kernel (csrc/cpu/nearest_rows.cpp), which is given all products."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from bkd_fast.ops.cpu_common import dense, kernels, tier
from bkd_fast.ops.nearest_rows import Arguments

PRODUCTS = 2**24  # held at a time
# Relative errors: of two rounded factors and a rounded product of bfloat16, with the sums' own; and of float32 sums.
BFLOAT_ERROR = 2.0**-7 + 2.0**-8 + 2.0**-12
FLOAT_ERROR = 2.0**-16


@cache
def has_fast_bfloat16() -> bool:
    """Return whether this CPU has instructions for products of bfloat16."""
    return bool(torch.cpu._is_avx512_bf16_supported())


def nearest_rows(a: Arguments) -> Tensor:
    """See :func:`bkd_fast.ops.nearest_rows`."""
    query, bank = dense(a.query), dense(a.bank)
    rounded = query.dtype == torch.float32 and has_fast_bfloat16()
    error = BFLOAT_ERROR if rounded else FLOAT_ERROR
    index = torch.empty((len(query), a.nearest), dtype=torch.int64)
    half_squares = bank.square().sum(1).mul_(0.5)
    columns = (bank.bfloat16() if rounded else bank).T
    step = max(1, PRODUCTS // len(bank))
    for start in range(0, len(query), step):
        rows = query[start : start + step]
        products = (rows.bfloat16() if rounded else rows) @ columns
        kernels.nearest_rows(tier(), rows, bank, half_squares, products, error, index[start : start + step])
    return index
