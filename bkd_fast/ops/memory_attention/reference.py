"""Sparse memory attention (Eq. 6-10) in plain PyTorch: the specification."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bkd_fast.ops.memory_attention import Arguments
from bkd_fast.ops.registration import wide

EPSILON = 1e-8  # smallest product of norms in a cosine
DELTA = 1e-12  # of Eq. 9
ROWS = 16_384  # queries whose weights are held at a time


def sparse_memory_attention(a: Arguments) -> Tensor:
    """See :func:`bkd_fast.ops.sparse_memory_attention`."""
    items = a.memory.to(wide(a.memory))
    rows = a.query.reshape(-1, a.query.shape[-1])
    parts = [memory_attention_weights(part, *a[1:]) @ items for part in rows.split(ROWS)]
    return torch.cat(parts).to(a.query.dtype).view(a.query.shape)


def sparse_memory_attention_backward(grad: Tensor, a: Arguments, needs: Sequence[bool]) -> list[Tensor]:
    """Return the gradients with respect to all tensors; empty where ``needs`` is False.

    The weights are computed again.
    """
    items = a.memory.to(wide(a.memory))
    grad_memory = torch.zeros_like(items)
    grad_query = []
    width = a.query.shape[-1]
    for z, g in zip(a.query.reshape(-1, width).split(ROWS), grad.reshape(-1, width).split(ROWS), strict=True):
        z, g = z.to(wide(z)), g.to(wide(g))
        similarity = _Similarity(z, items)
        weights, sparse = _sparse(similarity.cosine, a.threshold, a.temperature)
        read, total = _normalized(sparse, a.renormalize)
        grad_read = g @ items.t()
        grad_sparse = grad_read
        if a.renormalize:
            grad_sparse = (grad_read - (grad_read * read).sum(1, keepdim=True)) / total
        above = (weights - a.threshold).clamp_min(0)
        slope = above / (above + DELTA) + weights * DELTA / (above + DELTA) ** 2  # of Eq. 9, where it is above
        grad_weights = grad_sparse * slope * (weights > a.threshold)
        grad_cosine = weights * (grad_weights - (grad_weights * weights).sum(1, keepdim=True)) / a.temperature
        grad_dot, pull = similarity.backward(grad_cosine)
        if needs[0]:
            grad_query.append(grad_dot @ items - pull.sum(1, keepdim=True) * z * similarity.query_scale)
        if needs[1]:
            grad_memory += read.t() @ g + grad_dot.t() @ z - pull.sum(0).unsqueeze(1) * items * similarity.memory_scale
    return [
        torch.cat(grad_query).to(a.query.dtype).view(a.query.shape) if needs[0] else a.query.new_empty(0),
        grad_memory.to(a.memory.dtype) if needs[1] else a.memory.new_empty(0),
    ]


def memory_attention_weights(
    query: Tensor, memory: Tensor, threshold: float, temperature: float, renormalize: bool
) -> Tensor:
    """Return the sparse weights that :func:`sparse_memory_attention` reads the memory with (Eq. 6-9).

    Args:
        query: (..., N). memory: (I, N).

    Returns:
        (..., I), float32 at least; with ``renormalize`` rows sum to one, or are zero where every weight was pruned.
    """
    _, sparse = _sparse(_Similarity(query.to(wide(query)), memory.to(wide(memory))).cosine, threshold, temperature)
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
        """Return the gradient with respect to the dot products, and the part through the norms.

        The latter is in units of a vector over its square.
        """
        return grad / self.norms, grad * self.cosine * self.regular


def _sparse(cosine: Tensor, threshold: float, temperature: float) -> tuple[Tensor, Tensor]:
    """Eq. 6, and Eq. 9 of it."""
    weights = (cosine / temperature).softmax(-1)
    difference = weights - threshold
    return weights, difference.relu() * weights / (difference.abs() + DELTA)


def _normalized(sparse: Tensor, renormalize: bool) -> tuple[Tensor, Tensor]:
    """Return rows that sum to one if asked for, and what they were divided by."""
    if not renormalize:
        return sparse, torch.ones_like(sparse[..., :1])
    total = sparse.sum(-1, keepdim=True)
    total = torch.where(total > 0, total, torch.ones_like(total))  # a row that was pruned whole stays zero
    return sparse / total, total
