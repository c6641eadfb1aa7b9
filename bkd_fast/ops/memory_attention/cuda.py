"""Sparse memory attention on CUDA kernels (csrc/cuda/memory_attention.cu)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bkd_fast.ops.cuda_common import aligned, kernels
from bkd_fast.ops.layout import floats, spans, whole_chunks
from bkd_fast.ops.memory_attention import Arguments
from bkd_fast.ops.memory_attention.gpu import MAX_PRODUCTS, attention_backward, norms, products

# The share of a row's weights that are read one by one. Where more are kept, products of tiles cost less; on tensor
# cores they cost a quarter.
LISTED = {torch.float32: 1 / 8, torch.float16: 1 / 32, torch.bfloat16: 1 / 32}
MIN_LISTED = 32


def sparse_memory_attention(a: Arguments) -> Tensor:
    """See :func:`bkd_fast.ops.sparse_memory_attention`."""
    rows, items = _chunks(a.query.reshape(-1, a.query.shape[-1])), _chunks(a.memory.to(a.query.dtype))
    item_norms, count = norms(items), len(items)
    max_kept = min(count, max(MIN_LISTED, int(count * LISTED[a.query.dtype])))
    # Like any product of matrices, it asks PyTorch's switch for those.
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    output = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    for span in spans(len(rows), max(1, MAX_PRODUCTS // count)):
        part = rows[span]
        kept = floats((len(part), max_kept, 2), part)
        counts = torch.empty(len(part), dtype=torch.int32, device=rows.device)
        kernels().memory_attention(
            products(part, items), items, norms(part), item_norms, a.threshold, a.temperature, a.renormalize, tf32,
            kept, counts, output[span],
        )  # fmt: skip
    return output[:, : a.query.shape[-1]].reshape(a.query.shape)


def sparse_memory_attention_backward(grad: Tensor, a: Arguments, needs: Sequence[bool]) -> list[Tensor]:
    """Return the gradients with respect to all tensors; empty where ``needs`` is False."""

    def between(query_norms: Tensor, memory_norms: Tensor, grad_dot: Tensor, read: Tensor, pull: Tensor) -> None:
        kernels().memory_attention_gradient(
            query_norms, memory_norms, a.threshold, a.temperature, a.renormalize, grad_dot, read, pull
        )

    return attention_backward(grad, a.query, a.memory, needs, between)


def _chunks(rows: Tensor) -> Tensor:
    return aligned(whole_chunks(rows, 1, rows.shape[1]).contiguous())
