"""Sparse memory attention on CUDA kernels (csrc/cuda/memory_attention.cu)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bkd_fast.ops.gpu.attention_backward import attention_backward
from bkd_fast.ops.gpu.layout import floats, spans, whole_chunks
from bkd_fast.ops.gpu.products import MOST_PRODUCTS, norms, products
from bkd_fast.ops.native.cuda.layout import aligned, kernels

# Of a row's weights so many are read one by one; where more are kept, products of tiles cost less. On tensor cores they
# cost a quarter.
LISTED = {torch.float32: 1 / 8, torch.float16: 1 / 32, torch.bfloat16: 1 / 32}
LEAST_LISTED = 32


def sparse_memory_attention(
    query: Tensor, memory: Tensor, threshold: float, temperature: float, renormalize: bool
) -> Tensor:
    """See :func:`bkd_fast.ops.sparse_memory_attention`."""
    rows, items = _chunks(query.reshape(-1, query.shape[-1])), _chunks(memory.to(query.dtype))
    item_norms, count = norms(items), len(items)
    most = min(count, max(LEAST_LISTED, int(count * LISTED[query.dtype])))
    # Like any product of matrices, it asks PyTorch's switch for those.
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    output = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    for span in spans(len(rows), max(1, MOST_PRODUCTS // count)):
        part = rows[span]
        kept = floats((len(part), most, 2), part)
        counts = torch.empty(len(part), dtype=torch.int32, device=rows.device)
        kernels().memory_attention(
            products(part, items), items, norms(part), item_norms, threshold, temperature, renormalize, tf32, kept,
            counts, output[span],
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
