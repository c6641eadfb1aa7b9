"""Sparse memory attention on CUDA kernels (csrc/cuda/memory_attention.cu)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bkd_fast.ops.native.cuda.layout import aligned, floats, kernels, processors, whole_chunks

ROWS = 64  # queries that a block has; items too
MOST_ROWS = 2**24  # queries at a time
GRADIENT_NUMBERS = 2**24  # products of queries and items that are held at a time in the backward pass


def sparse_memory_attention(
    query: Tensor, memory: Tensor, threshold: float, temperature: float, renormalize: bool
) -> Tensor:
    """See :func:`bkd_fast.ops.sparse_memory_attention`."""
    rows, items = _chunks(query.reshape(-1, query.shape[-1])), _chunks(memory.to(query.dtype))
    item_norms = _norms(items)
    # Like any product of matrices, it asks PyTorch's switch for those.
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    output = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    for start in range(0, len(rows), MOST_ROWS):
        part = rows[start : start + MOST_ROWS]
        blocks = math.ceil(len(part) / ROWS)
        splits = max(1, min(math.ceil(len(items) / ROWS), 2 * processors(rows) // blocks))
        parts = floats((splits, len(part), 2), rows)
        kernels().memory_attention(
            part, items, _norms(part), item_norms, threshold, temperature, renormalize, tf32, parts,
            output[start : start + MOST_ROWS],
        )  # fmt: skip
    return output[:, : query.shape[-1]].reshape(query.shape)


def sparse_memory_attention_backward(
    grad: Tensor,
    query: Tensor,
    memory: Tensor,
    threshold: float,
    temperature: float,
    renormalize: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """Gradients by query and memory; empty tensors where ``needs`` says so.

    The products are PyTorch's, in float32 (or TF32, where it is allowed), of so many queries at a time that
    GRADIENT_NUMBERS weights are held; one kernel makes all that lies between them.
    """
    width = query.shape[-1]
    items = memory.float()
    item_norms = _norms(items)
    by_memory = torch.zeros_like(items) if needs[1] else items.new_empty(0)
    by_query = []
    step = max(1, GRADIENT_NUMBERS // len(items))
    for z, g in zip(query.reshape(-1, width).split(step), grad.reshape(-1, width).split(step), strict=True):
        z, g = z.float(), g.float()
        norms = _norms(z)
        by_dot, read = z @ items.t(), g @ items.t()
        pull = torch.empty_like(by_dot)
        kernels().memory_attention_gradient(norms, item_norms, threshold, temperature, renormalize, by_dot, read, pull)
        if needs[0]:
            by_query.append(by_dot @ items - pull.sum(1, keepdim=True) * z * _inverse_square(norms))
        if needs[1]:
            by_memory += read.t() @ g + by_dot.t() @ z - pull.sum(0).unsqueeze(1) * items * _inverse_square(item_norms)
    return (
        torch.cat(by_query).to(query.dtype).view(query.shape) if needs[0] else query.new_empty(0),
        by_memory.to(memory.dtype),
    )


def _chunks(rows: Tensor) -> Tensor:
    return aligned(whole_chunks(rows, 1, rows.shape[1]).contiguous())


def _norms(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32)


def _inverse_square(norms: Tensor) -> Tensor:
    return norms.square().clamp_min(1e-16).reciprocal().unsqueeze(1)
