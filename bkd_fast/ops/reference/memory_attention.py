"""Sparse memory attention (Eq. 6-10) in plain PyTorch: the specification."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

EPSILON = 1e-8  # least product of norms in a cosine
DELTA = 1e-12  # of Eq. 9
ROWS = 16_384  # queries whose weights are held at a time


def sparse_memory_attention(
    query: Tensor, memory: Tensor, threshold: float, temperature: float, renormalize: bool
) -> Tensor:
    """See :func:`bkd_fast.ops.sparse_memory_attention`."""
    wide = _wide(memory)
    rows = query.reshape(-1, query.shape[-1])
    parts = [
        memory_attention_weights(part, memory, threshold, temperature, renormalize) @ wide for part in rows.split(ROWS)
    ]
    return torch.cat(parts).to(query.dtype).view(query.shape)


def sparse_memory_attention_backward(
    grad: Tensor,
    query: Tensor,
    memory: Tensor,
    threshold: float,
    temperature: float,
    renormalize: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """Gradients by query and memory; empty tensors where ``needs`` says so. The weights are computed again."""
    items = _wide(memory)
    by_memory = torch.zeros_like(items)
    by_query = []
    width = query.shape[-1]
    for z, g in zip(query.reshape(-1, width).split(ROWS), grad.reshape(-1, width).split(ROWS), strict=True):
        z, g = _wide(z), _wide(g)
        similarity = _Similarity(z, items)
        weights, sparse = _sparse(similarity.cosine, threshold, temperature)
        read, total = _normalized(sparse, renormalize)
        by_read = g @ items.t()
        by_sparse = by_read
        if renormalize:
            by_sparse = (by_read - (by_read * read).sum(1, keepdim=True)) / total
        above = (weights - threshold).clamp_min(0)
        slope = above / (above + DELTA) + weights * DELTA / (above + DELTA) ** 2  # of Eq. 9, where it is above
        by_weights = by_sparse * slope * (weights > threshold)
        by_cosine = weights * (by_weights - (by_weights * weights).sum(1, keepdim=True)) / temperature
        by_dot, pull = similarity.backward(by_cosine)
        if needs[0]:
            by_query.append(by_dot @ items - pull.sum(1, keepdim=True) * z * similarity.query_scale)
        if needs[1]:
            by_memory += read.t() @ g + by_dot.t() @ z - pull.sum(0).unsqueeze(1) * items * similarity.memory_scale
    return (
        torch.cat(by_query).to(query.dtype).view(query.shape) if needs[0] else query.new_empty(0),
        by_memory.to(memory.dtype) if needs[1] else memory.new_empty(0),
    )


def memory_attention_weights(
    query: Tensor, memory: Tensor, threshold: float, temperature: float, renormalize: bool
) -> Tensor:
    """The sparse weights that :func:`sparse_memory_attention` reads the memory with (Eq. 6-9).

    Args:
        query: (..., N). memory: (I, N).

    Returns:
        (..., I), float32 at least; with ``renormalize`` rows sum to one, or are zero where every weight was pruned.
    """
    _, sparse = _sparse(_Similarity(_wide(query), _wide(memory)).cosine, threshold, temperature)
    return _normalized(sparse, renormalize)[0]


class _Similarity:
    """Eq. 7 of every row with every item, (..., I), and its gradient."""

    def __init__(self, query: Tensor, memory: Tensor) -> None:
        query_norm, memory_norm = query.norm(dim=-1, keepdim=True), memory.norm(dim=-1, keepdim=True)
        norms = query_norm * memory_norm.t()
        self.norms = norms.clamp_min(EPSILON)
        self.cosine = query @ memory.t() / self.norms
        self.regular = norms > EPSILON
        self.query_scale = query_norm.square().clamp_min(EPSILON**2).reciprocal()
        self.memory_scale = memory_norm.square().clamp_min(EPSILON**2).reciprocal()

    def backward(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient by the dot products, and what the norms take back (in units of a vector over its square)."""
        return grad / self.norms, grad * self.cosine * self.regular


def _sparse(cosine: Tensor, threshold: float, temperature: float) -> tuple[Tensor, Tensor]:
    """Eq. 6, and Eq. 9 of it."""
    weights = (cosine / temperature).softmax(-1)
    difference = weights - threshold
    return weights, difference.relu() * weights / (difference.abs() + DELTA)


def _normalized(sparse: Tensor, renormalize: bool) -> tuple[Tensor, Tensor]:
    """Rows that sum to one if asked for, and what they were divided by."""
    if not renormalize:
        return sparse, torch.ones_like(sparse[..., :1])
    total = sparse.sum(-1, keepdim=True)
    total = torch.where(total > 0, total, torch.ones_like(total))  # a row that was pruned whole stays zero
    return sparse / total, total


def _wide(value: Tensor) -> Tensor:
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
