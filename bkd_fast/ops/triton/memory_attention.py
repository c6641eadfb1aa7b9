"""Sparse memory attention in Triton.

A weight is known only when all logits of its row are: one kernel finds each row's largest logit and the sum of
exponentials, a second computes the logits again, shrinks the weights and reads the memory with them. No matrix of
queries and items is stored.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from bkd_fast.ops.gpu.attention_backward import attention_backward, norms
from bkd_fast.ops.gpu.layout import floats, spans, whole_chunks
from bkd_fast.ops.memory_attention import BACKWARD_SCHEMA, SCHEMA
from bkd_fast.ops.triton.launching import Tuned, bucket, config, kind_of, operator
from bkd_fast.ops.triton.sampling import chunks

MOST_ROWS = 2**24  # queries at a time
EPSILON = tl.constexpr(1e-8)  # least product of norms in a cosine
DELTA = tl.constexpr(1e-12)  # of Eq. 9


@triton.jit
def logits_of(
    query, memory, query_norm, memory_norms, row, item, rows, items, channels, temperature,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Eq. 7 over the temperature, of a block of queries and items; minus infinity beyond the last item."""
    dots = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    query_at = tl.cast(row, tl.int64)[:, None] * channels
    memory_at = tl.cast(item, tl.int64)[None, :] * channels
    for start in range(0, channels, BLOCK_K):
        channel = start + tl.arange(0, BLOCK_K)
        within = channel < channels
        own = tl.load(query + query_at + channel[None, :], mask=(row < rows)[:, None] & within[None, :], other=0.0)
        other = tl.load(
            memory + memory_at + channel[:, None], mask=within[:, None] & (item < items)[None, :], other=0.0
        )
        dots = tl.dot(own, other, dots, input_precision=PRECISION)
    memory_norm = tl.load(memory_norms + item, mask=item < items, other=0.0)
    size = tl.maximum(query_norm[:, None] * memory_norm[None, :], EPSILON)
    return tl.where((item < items)[None, :], dots / size / temperature, float("-inf"))


@triton.jit
def shrunk(weights, threshold):
    """Eq. 9."""
    above = tl.maximum(weights - threshold, 0.0)
    return above * weights / (above + DELTA)


@triton.jit
def memory_normalizer_kernel(
    query, memory, query_norms, memory_norms, largest, total, rows, items, channels, temperature, problem,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Of each query: its largest logit, and the sum of the exponentials of all logits less that one."""
    channels = chunks(channels, query.dtype)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    query_norm = tl.load(query_norms + row, mask=row < rows, other=0.0)
    most = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    sums = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(0, items, BLOCK_N):
        logits = logits_of(
            query, memory, query_norm, memory_norms, row, first + tl.arange(0, BLOCK_N), rows, items, channels,
            temperature, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        more = tl.maximum(most, tl.max(logits, 1))
        sums = sums * tl.exp(most - more) + tl.sum(tl.exp(logits - more[:, None]), 1)
        most = more
    tl.store(largest + row, most, mask=row < rows)
    tl.store(total + row, sums, mask=row < rows)


@triton.jit
def memory_attention_kernel(
    query, memory, query_norms, memory_norms, largest, total, output,
    rows, items, channels, threshold, temperature, problem,
    RENORMALIZE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_C channels of what a block of queries reads."""
    channels = chunks(channels, query.dtype)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    query_norm = tl.load(query_norms + row, mask=row < rows, other=0.0)
    most = tl.load(largest + row, mask=row < rows, other=0.0)
    sums = tl.load(total + row, mask=row < rows, other=1.0)
    part = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    found = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    kept = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(0, items, BLOCK_N):
        item = first + tl.arange(0, BLOCK_N)
        logits = logits_of(
            query, memory, query_norm, memory_norms, row, item, rows, items, channels, temperature, PRECISION,
            BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        sparse = shrunk(tl.exp(logits - most[:, None]) / sums[:, None], threshold)
        kept += tl.sum(sparse, 1)
        at = tl.cast(item, tl.int64)[:, None] * channels + part[None, :]
        values = tl.load(memory + at, mask=(item < items)[:, None] & (part < channels)[None, :], other=0.0)
        found = tl.dot(sparse.to(values.dtype), values, found, input_precision=PRECISION)
    if RENORMALIZE:
        found /= tl.where(kept > 0, kept, 1.0)[:, None]
    to = tl.cast(row, tl.int64)[:, None] * channels + part[None, :]
    tl.store(output + to, found.to(output.dtype.element_ty), mask=(row < rows)[:, None] & (part < channels)[None, :])


@triton.jit
def memory_attention_gradient_kernel(
    query_norms, memory_norms, by_dot, read, pull, rows, items, threshold, temperature,
    RENORMALIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What lies between the products of the backward pass, for a block of queries; see ``Between``.

    by_dot: the products of queries and items, replaced by the gradient by them. read: those of the gradient and the
    items, replaced by the weights. pull: what the norms take back.
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    own = row < rows
    query_norm = tl.load(query_norms + row, mask=own, other=0.0)
    at = tl.cast(row, tl.int64)[:, None] * items
    most = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    sums = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(0, items, BLOCK_N):
        item = first + tl.arange(0, BLOCK_N)
        size = tl.maximum(query_norm[:, None] * tl.load(memory_norms + item, mask=item < items, other=0.0), EPSILON)
        dots = tl.load(by_dot + at + item[None, :], mask=own[:, None] & (item < items)[None, :], other=0.0)
        logits = tl.where((item < items)[None, :], dots / size / temperature, float("-inf"))
        more = tl.maximum(most, tl.max(logits, 1))
        sums = sums * tl.exp(most - more) + tl.sum(tl.exp(logits - more[:, None]), 1)
        most = more
    kept = tl.zeros((BLOCK_M,), tl.float32)  # sums of the sparse weights,
    kept_read = tl.zeros((BLOCK_M,), tl.float32)  # times what they read,
    steep = tl.zeros((BLOCK_M,), tl.float32)  # and the same of the weights times the slope of Eq. 9
    steep_read = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(0, items, BLOCK_N):
        item = first + tl.arange(0, BLOCK_N)
        both = own[:, None] & (item < items)[None, :]
        size = tl.maximum(query_norm[:, None] * tl.load(memory_norms + item, mask=item < items, other=0.0), EPSILON)
        logits = tl.load(by_dot + at + item[None, :], mask=both, other=float("-inf")) / size / temperature
        weights = tl.exp(logits - most[:, None]) / sums[:, None]
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
        cosine = tl.load(by_dot + at + item[None, :], mask=both, other=0.0) / size
        weights = tl.exp(cosine / temperature - most[:, None]) / sums[:, None]
        by_read = tl.load(read + at + item[None, :], mask=both, other=0.0)
        by_weights = (by_read - share[:, None]) * scale[:, None] * slope_of(weights, threshold)
        by_cosine = weights * (by_weights - inner[:, None]) / temperature
        tl.store(by_dot + at + item[None, :], by_cosine / size, mask=both)
        tl.store(read + at + item[None, :], shrunk(weights, threshold) * scale[:, None], mask=both)
        tl.store(pull + at + item[None, :], tl.where(norm > EPSILON, by_cosine * cosine, 0.0), mask=both)


@triton.jit
def slope_of(weights, threshold):
    """The derivative of Eq. 9; 0 where a weight is pruned."""
    above = tl.maximum(weights - threshold, 0.0)
    slope = above / (above + DELTA) + weights * DELTA / (above + DELTA) / (above + DELTA)
    return tl.where(weights > threshold, slope, 0.0)


NORMALIZER = Tuned(
    memory_normalizer_kernel,
    {
        "half": (
            config(4, 2, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64),
            config(8, 2, BLOCK_M=128, BLOCK_N=64, BLOCK_K=64),
            config(4, 3, BLOCK_M=32, BLOCK_N=128, BLOCK_K=64),
        ),
        "tf32": (
            config(4, 2, BLOCK_M=64, BLOCK_N=64, BLOCK_K=32),
            config(8, 2, BLOCK_M=128, BLOCK_N=64, BLOCK_K=32),
        ),
        "ieee": (
            config(4, 1, BLOCK_M=32, BLOCK_N=32, BLOCK_K=16),
            config(8, 1, BLOCK_M=64, BLOCK_N=64, BLOCK_K=16),
        ),
    },
    key=("channels", "items", "problem"),
)
KERNEL = Tuned(
    memory_attention_kernel,
    {
        "half": (
            config(4, 2, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64, BLOCK_C=64),
            config(8, 2, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64, BLOCK_C=128),
            config(8, 2, BLOCK_M=64, BLOCK_N=32, BLOCK_K=64, BLOCK_C=256),
        ),
        "tf32": (
            config(4, 2, BLOCK_M=64, BLOCK_N=32, BLOCK_K=32, BLOCK_C=64),
            config(8, 2, BLOCK_M=32, BLOCK_N=32, BLOCK_K=32, BLOCK_C=128),
        ),
        "ieee": (
            config(8, 1, BLOCK_M=32, BLOCK_N=32, BLOCK_K=16, BLOCK_C=32),
            config(8, 1, BLOCK_M=64, BLOCK_N=32, BLOCK_K=16, BLOCK_C=64),
        ),
    },
    key=("channels", "items", "problem"),
)
# It changes what it reads, so that it has one configuration.
GRADIENT = Tuned(memory_attention_gradient_kernel, {"any": (config(4, BLOCK_M=4, BLOCK_N=256),)}, key=())


@operator(SCHEMA)
def sparse_memory_attention(
    query: Tensor, memory: Tensor, threshold: float, temperature: float, renormalize: bool
) -> Tensor:
    """See :func:`bkd_fast.ops.sparse_memory_attention`."""
    width = query.shape[-1]
    queries = whole_chunks(query.reshape(-1, width), 1, width).contiguous()
    memory = whole_chunks(memory.to(query.dtype), 1, width).contiguous()
    items, channels = memory.shape
    memory_norms = norms(memory)
    # Like any product of matrices, it asks PyTorch's switch for those.
    kind = kind_of(query, torch.backends.cuda.matmul.fp32_precision == "tf32")
    precision = "tf32" if kind == "tf32" else "ieee"
    output = torch.empty(queries.shape, dtype=query.dtype, device=query.device)
    normalizer, kernel = NORMALIZER(kind), KERNEL(kind)
    for span in spans(len(queries), MOST_ROWS):
        part = queries[span]
        rows, problem = len(part), bucket(len(queries))
        found, query_norms = output[span], norms(part)
        largest, total = floats((rows,), part), floats((rows,), part)
        wrap_triton(normalizer)[lambda meta, rows=rows: (triton.cdiv(rows, meta["BLOCK_M"]),)](
            part, memory, query_norms, memory_norms, largest, total, rows, items, channels, temperature, problem,
            PRECISION=precision,
        )  # fmt: skip
        wrap_triton(kernel)[
            lambda meta, rows=rows: (triton.cdiv(rows, meta["BLOCK_M"]), triton.cdiv(channels, meta["BLOCK_C"]))
        ](
            part, memory, query_norms, memory_norms, largest, total, found, rows, items, channels, threshold,
            temperature, problem, RENORMALIZE=renormalize, PRECISION=precision,
        )  # fmt: skip
    return output[:, :width].reshape(query.shape)


@operator(BACKWARD_SCHEMA)
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
    kernel = GRADIENT()

    def between(query_norms: Tensor, memory_norms: Tensor, by_dot: Tensor, read: Tensor, pull: Tensor) -> None:
        rows, items = by_dot.shape
        if rows == 0:
            return
        wrap_triton(kernel)[lambda meta: (triton.cdiv(rows, meta["BLOCK_M"]),)](
            query_norms, memory_norms, by_dot, read, pull, rows, items, threshold, temperature,
            RENORMALIZE=renormalize,
        )  # fmt: skip

    return attention_backward(grad, query, memory, needs, between)
