"""The memory of normal features that a query is read through (Eq. 6-10)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bkd_fast.config import MemoryConfig
from bkd_fast.ops import sparse_memory_attention
from bkd_fast.ops.memory_attention.reference import memory_attention_weights
from bkd_fast.ops.nearest_rows import PreparedRows, nearest_rows, prepare_rows
from bkd_fast.ops.nearest_rows.reference import nearest
from bkd_fast.ops.neighbor_regression import RIDGE, neighbor_regression
from bkd_fast.ops.neighbor_regression.reference import combined, regression_weights


class SparseMemory(nn.Module):
    """I items of C channels; a feature is replaced by a sparse combination of items.

    ``read="neighbors"``: the least-squares combination of the few items that are nearest in squared distance.
    ``"attention"``: the sum of items weighted by a softmax of cosines, small weights pruned (Eq. 7-10).

    The items are parameters, drawn from U(-1/sqrt(C), 1/sqrt(C)) (MemAE) until
    :func:`bkd_fast.model.calibration.calibrate` puts normal features in. ``origin`` (I,) int64 then says which training
    image each comes from (-1: none).

    :meth:`prepare` computes once what reading needs of items that no longer change. Training, moving the module, and
    replacing or writing to the items forget it.
    """

    prepared: PreparedRows | None = None

    def __init__(self, channels: int, config: MemoryConfig) -> None:
        super().__init__()
        self.read, self.neighbors = config.read, min(config.neighbors, config.items)
        self.threshold = config.threshold / config.items
        self.temperature = config.temperature
        self.renormalize = config.renormalize
        bound = channels**-0.5
        items = torch.empty(config.items, channels).uniform_(-bound, bound)
        self.items = nn.Parameter(items, requires_grad=config.learned)
        self.register_buffer("origin", torch.full((config.items,), -1))

    def prepare(self) -> None:
        """Compute once what every read takes of the items alone: results keep their bits."""
        if self.read == "neighbors":
            self.prepared, self._prepared_for = prepare_rows(self.items.detach()), (self.items, _version(self.items))

    def train(self, mode: bool = True) -> SparseMemory:
        """See :meth:`torch.nn.Module.train`."""
        if mode:
            self.prepared = None
        return super().train(mode)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> SparseMemory:
        self.prepared = None
        return super()._apply(fn, recurse)

    def forward(self, features: Tensor, exclude: Tensor | None = None) -> Tensor:
        """Return z' of the shape of z = ``features`` (N, C, H, W).

        Args:
            exclude: (N, I) bool, items that a query must not be read from (``"neighbors"`` only).
        """
        query = features.permute(0, 2, 3, 1)
        if self.read == "attention":
            read = sparse_memory_attention(query, self.items, self.threshold, self.temperature, self.renormalize)
            return read.permute(0, 3, 1, 2)
        rows = query.flatten(0, 2)
        if exclude is not None:
            exclude = exclude.repeat_interleave(query.shape[1] * query.shape[2], 0)  # (N * H * W, I)
        chosen = self._nearest(rows, exclude)
        if torch.is_grad_enabled() and (rows.requires_grad or self.items.requires_grad):
            read = combined(rows, self.items, chosen, RIDGE)  # which has a gradient
        else:
            read = neighbor_regression(rows, self.items, chosen)
        return read.view(query.shape).permute(0, 3, 1, 2)

    def attention(self, features: Tensor) -> Tensor:
        """Return the weights (N, H, W, I) of every item in what ``features`` are replaced by, to look at."""
        query = features.permute(0, 2, 3, 1)
        if self.read == "attention":
            return memory_attention_weights(query, self.items, self.threshold, self.temperature, self.renormalize)
        rows = query.flatten(0, 2)
        chosen = self._nearest(rows, None)
        weights = regression_weights(rows, self.items[chosen])
        dense = weights.new_zeros(len(chosen), len(self.items)).scatter(1, chosen, weights)
        return dense.view(*query.shape[:3], -1)

    def _nearest(self, rows: Tensor, exclude: Tensor | None) -> Tensor:
        """Return the indices (R, k) of the items that features (R, C) are read from, in any order."""
        rows, items = rows.detach(), self.items.detach()
        if exclude is not None:
            return nearest(rows, items, self.neighbors, exclude)
        if self.prepared is not None and self._changed():
            self.prepared = None
        return nearest_rows(rows, self.prepared or items, self.neighbors)

    def _changed(self) -> bool:
        """Return whether the items were replaced or written to since :meth:`prepare`."""
        if torch.compiler.is_compiling():
            return False
        items, version = self._prepared_for
        return items is not self.items or _version(items) != version


def _version(tensor: Tensor) -> int | None:
    """Return a number that every write to a tensor changes; None where torch counts none."""
    return None if tensor.is_inference() else tensor._version
