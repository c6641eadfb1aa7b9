"""Sparse memory attention in Triton: PyTorch's products of matrices, and one kernel between them that makes weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from bkd_fast.ops.layout import spans, whole_chunks
from bkd_fast.ops.memory_attention import Arguments
from bkd_fast.ops.memory_attention.gpu import MAX_PRODUCTS, attention_backward, norms, products
from bkd_fast.ops.triton_common import Tuned, config, operator

EPSILON = tl.constexpr(1e-8)  # smallest product of norms in a cosine
DELTA = tl.constexpr(1e-12)  # of Eq. 9


@triton.jit
def shrunk(weights, threshold):
    """Eq. 9."""
    above = tl.maximum(weights - threshold, 0.0)
    return above * weights / (above + DELTA)


@triton.jit
def logits_of(dots, at, query_norm, memory_norms, own, item, items, temperature):
    """Eq. 7 over the temperature, of a block of queries and items; minus infinity beyond the last item."""
    size = tl.maximum(query_norm[:, None] * tl.load(memory_norms + item, mask=item < items, other=0.0), EPSILON)
    dot = tl.load(dots + at + item[None, :], mask=own[:, None] & (item < items)[None, :], other=0.0)
    return tl.where((item < items)[None, :], dot / size / temperature, float("-inf"))


@triton.jit
def normalizer(
    dots, at, query_norm, memory_norms, own, items, temperature, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Return each query's largest logit, and the sum of the exponentials of all logits less that one."""
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    sums = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(0, items, BLOCK_N):
        item = first + tl.arange(0, BLOCK_N)
        logits = logits_of(dots, at, query_norm, memory_norms, own, item, items, temperature)
        larger = tl.maximum(largest, tl.max(logits, 1))
        sums = sums * tl.exp(largest - larger) + tl.sum(tl.exp(logits - larger[:, None]), 1)
        largest = larger
    return largest, sums


@triton.jit
def memory_weights_kernel(
    dots, query_norms, memory_norms, output, rows, items, threshold, temperature,
    RENORMALIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The weights that a block of queries reads the memory with."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    own = row < rows
    query_norm = tl.load(query_norms + row, mask=own, other=0.0)
    at = tl.cast(row, tl.int64)[:, None] * items
    largest, sums = normalizer(dots, at, query_norm, memory_norms, own, items, temperature, BLOCK_M, BLOCK_N)
    scale = tl.full((BLOCK_M,), 1.0, tl.float32)
    if RENORMALIZE:
        kept = tl.zeros((BLOCK_M,), tl.float32)
        for first in range(0, items, BLOCK_N):
            item = first + tl.arange(0, BLOCK_N)
            logits = logits_of(dots, at, query_norm, memory_norms, own, item, items, temperature)
            kept += tl.sum(shrunk(tl.exp(logits - largest[:, None]) / sums[:, None], threshold), 1)
        scale = 1 / tl.where(kept > 0, kept, 1.0)
    for first in range(0, items, BLOCK_N):
        item = first + tl.arange(0, BLOCK_N)
        logits = logits_of(dots, at, query_norm, memory_norms, own, item, items, temperature)
        weights = shrunk(tl.exp(logits - largest[:, None]) / sums[:, None], threshold) * scale[:, None]
        to = output + at + item[None, :]
        tl.store(to, weights.to(output.dtype.element_ty), mask=own[:, None] & (item < items)[None, :])


@triton.jit
def memory_attention_gradient_kernel(
    query_norms, memory_norms, grad_dot, read, pull, rows, items, threshold, temperature,
    RENORMALIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The step between the products of the backward pass, for a block of queries; see ``Between``.

    grad_dot: the products of queries and items, replaced by the gradient by them. read: those of the gradient and the
    items, replaced by the weights. pull: what the norms take back.
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    own = row < rows
    query_norm = tl.load(query_norms + row, mask=own, other=0.0)
    at = tl.cast(row, tl.int64)[:, None] * items
    largest, sums = normalizer(grad_dot, at, query_norm, memory_norms, own, items, temperature, BLOCK_M, BLOCK_N)
    kept = tl.zeros((BLOCK_M,), tl.float32)  # sums of the sparse weights,
    kept_read = tl.zeros((BLOCK_M,), tl.float32)  # times what they read,
    steep = tl.zeros((BLOCK_M,), tl.float32)  # and the same of the weights times the slope of Eq. 9
    steep_read = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(0, items, BLOCK_N):
        item = first + tl.arange(0, BLOCK_N)
        both = own[:, None] & (item < items)[None, :]
        size = tl.maximum(query_norm[:, None] * tl.load(memory_norms + item, mask=item < items, other=0.0), EPSILON)
        logits = tl.load(grad_dot + at + item[None, :], mask=both, other=float("-inf")) / size / temperature
        weights = tl.exp(logits - largest[:, None]) / sums[:, None]
        by_read = tl.load(read + at + item[None, :], mask=both, other=0.0)
        sparse = shrunk(weights, threshold)
        slope = weights * slope_of(weights, threshold)
        kept += tl.sum(sparse, 1)
        kept_read += tl.sum(sparse * by_read, 1)
        steep += tl.sum(slope, 1)
        steep_read += tl.sum(slope * by_read, 1)
    share = tl.zeros((BLOCK_M,), tl.float32)
    scale = tl.full((BLOCK_M,), 1.0, tl.float32)
    if RENORMALIZE:
        scale = 1 / tl.where(kept > 0, kept, 1.0)
        share = kept_read * scale
    inner = (steep_read - share * steep) * scale
    for first in range(0, items, BLOCK_N):
        item = first + tl.arange(0, BLOCK_N)
        both = own[:, None] & (item < items)[None, :]
        norm = query_norm[:, None] * tl.load(memory_norms + item, mask=item < items, other=0.0)
        size = tl.maximum(norm, EPSILON)
        cosine = tl.load(grad_dot + at + item[None, :], mask=both, other=0.0) / size
        weights = tl.exp(cosine / temperature - largest[:, None]) / sums[:, None]
        by_read = tl.load(read + at + item[None, :], mask=both, other=0.0)
        by_weights = (by_read - share[:, None]) * scale[:, None] * slope_of(weights, threshold)
        by_cosine = weights * (by_weights - inner[:, None]) / temperature
        tl.store(grad_dot + at + item[None, :], by_cosine / size, mask=both)
        tl.store(read + at + item[None, :], shrunk(weights, threshold) * scale[:, None], mask=both)
        tl.store(pull + at + item[None, :], tl.where(norm > EPSILON, by_cosine * cosine, 0.0), mask=both)


@triton.jit
def slope_of(weights, threshold):
    """The derivative of Eq. 9; 0 where a weight is pruned."""
    above = tl.maximum(weights - threshold, 0.0)
    slope = above / (above + DELTA) + weights * DELTA / (above + DELTA) / (above + DELTA)
    return tl.where(weights > threshold, slope, 0.0)


WEIGHTS = Tuned(
    memory_weights_kernel,
    {
        "any": (
            config(4, BLOCK_M=4, BLOCK_N=256),
            config(8, BLOCK_M=4, BLOCK_N=1024),
            config(4, BLOCK_M=1, BLOCK_N=1024),
        )
    },
    key=("items",),
)
# It changes what it reads, so that it has one configuration.
GRADIENT = Tuned(memory_attention_gradient_kernel, {"any": (config(4, BLOCK_M=4, BLOCK_N=256),)}, key=())


@operator
def sparse_memory_attention(a: Arguments) -> Tensor:
    """See :func:`bkd_fast.ops.sparse_memory_attention`."""
    width = a.query.shape[-1]
    queries = whole_chunks(a.query.reshape(-1, width), 1, width).contiguous()
    memory = whole_chunks(a.memory.to(a.query.dtype), 1, width).contiguous()
    memory_norms, items = norms(memory), len(memory)
    output = torch.empty(queries.shape, dtype=a.query.dtype, device=a.query.device)
    kernel = WEIGHTS()
    for span in spans(len(queries), max(1, MAX_PRODUCTS // items)):
        part = queries[span]
        dots, rows = products(part, memory), len(part)
        weights = torch.empty(dots.shape, dtype=a.query.dtype, device=a.query.device)
        wrap_triton(kernel)[lambda meta, rows=rows: (triton.cdiv(rows, meta["BLOCK_M"]),)](
            dots, norms(part), memory_norms, weights, rows, items, a.threshold, a.temperature, RENORMALIZE=a.renormalize
        )
        torch.mm(weights, memory, out=output[span])
    return output[:, :width].reshape(a.query.shape)


@operator
def sparse_memory_attention_backward(grad: Tensor, a: Arguments, needs: Sequence[bool]) -> list[Tensor]:
    """Return the gradients with respect to all tensors; empty where ``needs`` is False."""
    kernel = GRADIENT()

    def between(query_norms: Tensor, memory_norms: Tensor, grad_dot: Tensor, read: Tensor, pull: Tensor) -> None:
        rows, items = grad_dot.shape
        if rows == 0:
            return
        wrap_triton(kernel)[lambda meta: (triton.cdiv(rows, meta["BLOCK_M"]),)](
            query_norms, memory_norms, grad_dot, read, pull, rows, items, a.threshold, a.temperature,
            RENORMALIZE=a.renormalize,
        )  # fmt: skip

    return attention_backward(grad, a.query, a.memory, needs, between)
