"""The products of queries and memory items, and the gradient around a kernel, for both GPU backends."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bkd_fast.ops.layout import floats

MAX_PRODUCTS = 2**24  # of queries and items that are held at a time: 64 MB

# (query norms, memory norms, products of queries and items, products of gradient and items, pull): overwrite the first
# products with their gradient and the second ones with the weights, and fill in the part through the norms.
Between = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]


def attention_backward(
    grad: Tensor, query: Tensor, memory: Tensor, needs: Sequence[bool], between: Between
) -> list[Tensor]:
    """Return the gradients with respect to query and memory; empty where ``needs`` is False.

    The products are in float32 (or TF32, where it is allowed). At most MAX_PRODUCTS weights are held at a time.
    """
    width = query.shape[-1]
    items = memory.float()
    item_norms = norms(items)
    grad_memory = torch.zeros_like(items) if needs[1] else items.new_empty(0)
    grad_query = []
    rows, grads = query.reshape(-1, width), grad.reshape(-1, width)
    if len(rows) * len(items) <= MAX_PRODUCTS:
        pieces = [(rows, grads)]
    else:
        step = max(1, MAX_PRODUCTS // len(items))
        pieces = list(zip(rows.split(step), grads.split(step), strict=True))
    for z, g in pieces:
        z, g = z.float(), g.float()
        own_norms = norms(z)
        grad_dot, read = products(z, items), products(g, items)
        pull = floats(grad_dot.shape, grad_dot)
        between(own_norms, item_norms, grad_dot, read, pull)
        if needs[0]:
            grad_query.append(grad_dot @ items - pull.sum(1, keepdim=True) * z * _inverse_square(own_norms))
        if needs[1]:
            through_norms = pull.sum(0).unsqueeze(1) * items * _inverse_square(item_norms)
            grad_memory += read.t() @ g + grad_dot.t() @ z - through_norms
    return [torch.cat(grad_query).view(query.shape) if needs[0] else query.new_empty(0), grad_memory]


def _inverse_square(lengths: Tensor) -> Tensor:
    return lengths.square().clamp_min(1e-16).reciprocal().unsqueeze(1)


def products(rows: Tensor, items: Tensor) -> Tensor:
    """Multiply (N, C) and (I, C) of one dtype to (N, I) in float32, or TF32 where PyTorch allows it."""
    if rows.is_cuda and rows.dtype != torch.float32:
        return torch.mm(rows, items.t(), out_dtype=torch.float32)
    return rows.float() @ items.float().t()


def norms(rows: Tensor) -> Tensor:
    """Return the lengths of rows in float32."""
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32)
