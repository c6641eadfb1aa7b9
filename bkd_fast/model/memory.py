"""The memory of normal features that a query is read through (Eq. 6-10)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bkd_fast.config import BKDConfig
from bkd_fast.ops import sparse_memory_attention


class SparseMemory(nn.Module):
    """I items of C channels; a feature is replaced by its sparse, attention-weighted sum of items.

    The items are parameters, drawn from U(-1/sqrt(C), 1/sqrt(C)) (MemAE) until
    :func:`bkd_fast.model.calibration.calibrate` puts normal features in.
    """

    def __init__(self, channels: int, config: BKDConfig) -> None:
        super().__init__()
        self.threshold = config.memory_threshold
        self.temperature = config.memory_temperature
        self.renormalize = config.memory_renormalize
        bound = channels**-0.5
        self.items = nn.Parameter(torch.empty(config.memory_items, channels).uniform_(-bound, bound))

    def forward(self, features: Tensor) -> Tensor:
        """z of shape (N, C, H, W) -> z' of the same shape."""
        read = sparse_memory_attention(
            features.permute(0, 2, 3, 1), self.items, self.threshold, self.temperature, self.renormalize
        )
        return read.permute(0, 3, 1, 2)
