"""The gradient of the sparse memory attention: PyTorch's matrix products, and one kernel between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bkd_fast.ops.gpu.layout import floats
from bkd_fast.ops.gpu.products import MOST_PRODUCTS, norms, products

# (query norms, memory norms, products of queries and items, products of gradient and items, pull): makes of the first
# products the gradient by them, of the second ones the weights, and fills in what the norms take back.
Between = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]


def attention_backward(
    grad: Tensor, query: Tensor, memory: Tensor, needs: Sequence[bool], between: Between
) -> tuple[Tensor, Tensor]:
    """Gradients by query and memory; empty tensors where ``needs`` says so.

    The products are in float32 (or TF32, where it is allowed), of so many queries at a time that MOST_PRODUCTS
    weights are held.
    """
    width = query.shape[-1]
    items = memory.float()
    item_norms = norms(items)
    by_memory = torch.zeros_like(items) if needs[1] else items.new_empty(0)
    by_query = []
    rows, grads = query.reshape(-1, width), grad.reshape(-1, width)
    if len(rows) * len(items) <= MOST_PRODUCTS:
        pieces = [(rows, grads)]
    else:
        step = max(1, MOST_PRODUCTS // len(items))
        pieces = list(zip(rows.split(step), grads.split(step), strict=True))
    for z, g in pieces:
        z, g = z.float(), g.float()
        own_norms = norms(z)
        by_dot, read = products(z, items), products(g, items)
        pull = floats(by_dot.shape, by_dot)
        between(own_norms, item_norms, by_dot, read, pull)
        if needs[0]:
            by_query.append(by_dot @ items - pull.sum(1, keepdim=True) * z * _inverse_square(own_norms))
        if needs[1]:
            by_memory += read.t() @ g + by_dot.t() @ z - pull.sum(0).unsqueeze(1) * items * _inverse_square(item_norms)
    return (
        torch.cat(by_query).to(query.dtype).view(query.shape) if needs[0] else query.new_empty(0),
        by_memory.to(memory.dtype),
    )


def _inverse_square(lengths: Tensor) -> Tensor:
    return lengths.square().clamp_min(1e-16).reciprocal().unsqueeze(1)
