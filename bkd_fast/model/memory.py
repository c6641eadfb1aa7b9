"""The memory of normal features that a query is read through (Eq. 6-10)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bkd_fast.config import BKDConfig
from bkd_fast.model.lifting import lifted
from bkd_fast.ops import sparse_memory_attention
from bkd_fast.ops.reference.memory_attention import memory_attention_weights


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
        self.lift = config.lift
        bound = channels**-0.5
        items = torch.empty(config.memory_items, channels).uniform_(-bound, bound)
        self.items = nn.Parameter(items, requires_grad=config.memory_learned)

    def forward(self, features: Tensor) -> Tensor:
        """z of shape (N, C, H, W) -> z' of the same shape."""
        query, items = self._compared(features)
        read = sparse_memory_attention(query, items, self.threshold, self.temperature, self.renormalize)
        return read.permute(0, 3, 1, 2)[:, : features.shape[1]]

    def attention(self, features: Tensor) -> Tensor:
        """The weights (N, H, W, I) of every item in what ``features`` are replaced by (Eq. 9-10), to look at."""
        query, items = self._compared(features)
        return memory_attention_weights(query, items, self.threshold, self.temperature, self.renormalize)

    def _compared(self, features: Tensor) -> tuple[Tensor, Tensor]:
        (query,), (items,) = lifted([features], self.lift), lifted([self.items[:, :, None, None]], self.lift)
        return query.permute(0, 2, 3, 1), items.flatten(1)
