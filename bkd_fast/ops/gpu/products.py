"""Products of queries and items of a memory, in float32, and the lengths that cosines divide them by."""

from __future__ import annotations

import torch
from torch import Tensor

MOST_PRODUCTS = 2**24  # of queries and items that are held at a time: 64 MB


def products(rows: Tensor, items: Tensor) -> Tensor:
    """Of (N, C) and (I, C) of one type: (N, I), with whatever sums PyTorch's products of float32 have."""
    if rows.is_cuda and rows.dtype != torch.float32:
        return torch.mm(rows, items.t(), out_dtype=torch.float32)
    return rows.float() @ items.float().t()


def norms(rows: Tensor) -> Tensor:
    """Lengths in float32."""
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32)
