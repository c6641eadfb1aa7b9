"""Sparse memory attention on CUDA kernels (csrc/cuda/memory_attention.cu)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bkd_fast.ops.gpu.attention_backward import attention_backward, norms
from bkd_fast.ops.gpu.layout import floats, spans, whole_chunks
from bkd_fast.ops.native.cuda.layout import aligned, kernels, processors

ROWS = 64  # queries that a block has; items too
MOST_ROWS = 2**24  # queries at a time


def sparse_memory_attention(
    query: Tensor, memory: Tensor, threshold: float, temperature: float, renormalize: bool
) -> Tensor:
    """See :func:`bkd_fast.ops.sparse_memory_attention`."""
    rows, items = _chunks(query.reshape(-1, query.shape[-1])), _chunks(memory.to(query.dtype))
    item_norms = norms(items)
    # Like any product of matrices, it asks PyTorch's switch for those.
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    output = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    for span in spans(len(rows), MOST_ROWS):
        part = rows[span]
        blocks = math.ceil(len(part) / ROWS)
        splits = max(1, min(math.ceil(len(items) / ROWS), 2 * processors(rows) // blocks))
        parts = floats((splits, len(part), 2), rows)
        kernels().memory_attention(
            part, items, norms(part), item_norms, threshold, temperature, renormalize, tf32, parts,
            output[span],
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
    """Gradients by query and memory; empty tensors where ``needs`` says so."""

    def between(query_norms: Tensor, memory_norms: Tensor, by_dot: Tensor, read: Tensor, pull: Tensor) -> None:
        kernels().memory_attention_gradient(
            query_norms, memory_norms, threshold, temperature, renormalize, by_dot, read, pull
        )

    return attention_backward(grad, query, memory, needs, between)


def _chunks(rows: Tensor) -> Tensor:
    return aligned(whole_chunks(rows, 1, rows.shape[1]).contiguous())
