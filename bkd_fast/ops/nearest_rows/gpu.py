"""What the GPU kernels are given: half the squares of the rows, and all products of some of the queries at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bkd_fast.ops.layout import spans
from bkd_fast.ops.nearest_rows import Arguments, half_squares

MAX_PRODUCTS = 2**24  # held at a time


def problems(a: Arguments) -> tuple[Tensor, Tensor, Iterator[tuple[Tensor, Tensor]]]:
    """Return a buffer for the result, half the squares, and pairs of products (R, M) and their part of the result."""
    index = torch.empty((a.query.shape[0], a.nearest), dtype=torch.int64, device=a.query.device)
    query, bank = a.query.float(), a.bank.float()
    halves = half_squares(a.bank) if a.half_squares is None else a.half_squares.contiguous()
    parts = spans(query.shape[0], max(1, MAX_PRODUCTS // bank.shape[0]))
    return index, halves, ((query[part] @ bank.T, index[part]) for part in parts)
