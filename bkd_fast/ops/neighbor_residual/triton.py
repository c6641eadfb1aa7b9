"""The distance of rows from the combination of their neighbours in Triton: a program has a row."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from bkd_fast.ops.layout import floats
from bkd_fast.ops.neighbor_regression.gpu import rows_and_bank
from bkd_fast.ops.neighbor_regression.triton import MAX_BLOCK, differences, neighbors_of, weights_of
from bkd_fast.ops.neighbor_residual import Arguments, reference
from bkd_fast.ops.triton_common import Tuned, config, operator
from bkd_fast.ops.triton_sampling import chunks


@triton.jit
def neighbor_residual_kernel(
    query, bank, neighbors, values, residual, means, count, bank_rows, channels, own, width, ridge,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One row; ``own`` channels without zeros, ``width`` values of each row of the bank."""
    channels = chunks(channels, bank.dtype)
    row = tl.program_id(0).to(tl.int64)
    start, known, missing = neighbors_of(neighbors, row, count, bank_rows, channels, BLOCK_K)
    weight = weights_of(query, bank, row, start, known, count, channels, ridge, BLOCK_K, BLOCK_C)
    squares = tl.zeros((BLOCK_C,), tl.float32)
    for first in range(0, channels, BLOCK_C):
        channel = first + tl.arange(0, BLOCK_C)
        _, apart = differences(query, bank, row, start, known, channel, channels)
        # Weights sum to one: the difference is the weighted sum of the neighbours' differences.
        difference = tl.sum(weight[:, None] * apart, 0)
        squares += difference * difference
    mean = tl.sum(squares, 0) / own
    tl.store(residual + row, tl.where(missing, float("nan"), mean))
    for place in range(0, width):
        value = tl.load(values + start // channels * width + place, mask=known, other=0.0)
        tl.store(means + row * width + place, tl.where(missing, float("nan"), tl.sum(value, 0) / count))


RESIDUAL = Tuned(
    neighbor_residual_kernel,
    {"any": (config(2, BLOCK_C=32), config(4, BLOCK_C=64), config(8, BLOCK_C=128))},
    key=("channels", "BLOCK_K"),
)


@operator
def neighbor_residual(a: Arguments) -> tuple[Tensor, Tensor]:
    """See :func:`bkd_fast.ops.neighbor_residual`. More than 16 neighbours are combined in plain PyTorch."""
    count, width = a.neighbors.shape[1], a.values.shape[1]
    if count > MAX_BLOCK:
        return reference.neighbor_residual(a)
    query, bank = rows_and_bank(a.regression)
    residual, means = floats((len(query),), query), floats((len(query), width), query)
    if len(query):
        wrap_triton(RESIDUAL())[(len(query),)](
            query, bank, a.neighbors.contiguous(), a.values.float().contiguous(), residual, means,
            count, len(bank), query.shape[1], a.query.shape[1], width, a.ridge,
            BLOCK_K=max(2, 1 << (count - 1).bit_length()),
        )  # fmt: skip
    return residual, means
