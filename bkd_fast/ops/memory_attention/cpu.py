"""Sparse memory attention on CPU kernels (csrc/cpu/memory_attention.cpp)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bkd_fast.ops.cpu_common import dense, empty, kernels, product_dtype, tier
from bkd_fast.ops.memory_attention import Arguments
from bkd_fast.ops.registration import wide


def sparse_memory_attention(a: Arguments) -> Tensor:
    """See :func:`bkd_fast.ops.sparse_memory_attention`."""
    dtype = product_dtype(a.query, a.memory)
    query, memory = dense(a.query, dtype=dtype), dense(a.memory, dtype=dtype)
    output = torch.empty(query.shape, dtype=query.dtype)
    kernels.memory_attention(tier(), query, memory, a.threshold, a.temperature, a.renormalize, output)
    return output


def sparse_memory_attention_backward(grad: Tensor, a: Arguments, needs: Sequence[bool]) -> list[Tensor]:
    """Return the gradients with respect to all tensors; empty where ``needs`` is False."""
    grad_query = empty(a.query, needs[0])
    grad_memory = torch.zeros(a.memory.shape if needs[1] else 0, dtype=wide(a.memory))
    kernels.memory_attention_backward(
        tier(), dense(grad), dense(a.query), dense(a.memory), a.threshold, a.temperature, a.renormalize, grad_query,
        grad_memory,
    )  # fmt: skip
    return [grad_query, grad_memory]
