"""The nearest rows in Triton: PyTorch multiplies, and a program selects those of one query."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from bkd_fast.ops.nearest_rows import Arguments
from bkd_fast.ops.nearest_rows.gpu import problems
from bkd_fast.ops.triton_common import Tuned, bucket, config, operator


@triton.jit
def nearest_rows_kernel(
    products, half_squares, index, rows, count, size, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr
):  # size: a bucket, for the tuning
    """Keep the ``count`` rows with the largest scores, in any order, and sort them in the end.

    Of equal scores the first row is taken. What is not a number is never larger.
    """
    query = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    used = k < count
    best = tl.where(used, float("-inf"), float("inf"))
    row = k
    bound = tl.min(best, 0)
    for first in range(0, rows, BLOCK):
        place = first + tl.arange(0, BLOCK)
        valid = place < rows
        score = tl.load(products + query * rows + place, mask=valid, other=0.0)
        score -= tl.load(half_squares + place, mask=valid, other=0.0)
        score = tl.where(valid & (score == score), score, float("-inf"))
        largest = tl.max(score, 0)
        while largest > bound:
            chosen = tl.min(tl.where(score == largest, place, 2147483647), 0)
            smallest = used & (best == bound)
            dropped = smallest & (row == tl.max(tl.where(smallest, row, -1), 0))  # of equal scores the last row
            best = tl.where(dropped, largest, best)
            row = tl.where(dropped, chosen, row)
            bound = tl.min(best, 0)
            score = tl.where(place == chosen, float("-inf"), score)
            largest = tl.max(score, 0)
    rank = tl.zeros((BLOCK_K,), tl.int32)
    for other in range(0, count):
        other_score = tl.sum(tl.where(k == other, best, 0.0), 0)
        other_row = tl.sum(tl.where(k == other, row, 0), 0)
        rank += ((other_score > best) | ((other_score == best) & (other_row < row))).to(tl.int32)
    tl.store(index + query * count + rank, row.to(tl.int64), mask=used)


NEAREST = Tuned(
    nearest_rows_kernel,
    {"any": (config(1, BLOCK=256), config(2, BLOCK=512), config(4, BLOCK=1024))},
    key=("size", "BLOCK_K"),
)


@operator
def nearest_rows(a: Arguments) -> Tensor:
    """See :func:`bkd_fast.ops.nearest_rows`."""
    index, halves, parts = problems(a)
    for products, own in parts:
        wrap_triton(NEAREST())[(own.shape[0],)](
            products, halves, own, a.bank.shape[0], a.nearest, bucket(a.bank.shape[0]),
            BLOCK_K=max(2, 1 << (a.nearest - 1).bit_length()),
        )  # fmt: skip
    return index
