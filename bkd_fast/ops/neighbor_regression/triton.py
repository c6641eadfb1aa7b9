"""Rows as combinations of their neighbours in Triton: a program has a row."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from bkd_fast.ops.neighbor_regression import Arguments, reference
from bkd_fast.ops.neighbor_regression.gpu import regression_arguments
from bkd_fast.ops.triton_common import Tuned, config, operator
from bkd_fast.ops.triton_sampling import chunks


@triton.jit
def differences(query, bank, row, start, known, channel, channels):
    """Return a row of the query from channel on, and its neighbours less it; 0 where they are not ``known``."""
    within = channel < channels
    own = tl.load(query + row * channels + channel, mask=within, other=0.0)
    mask = known[:, None] & within[None, :]
    rows = tl.load(bank + start[:, None] + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    return own, tl.where(mask, rows - own[None, :], 0.0)


@triton.jit
def neighbors_of(neighbors, row, count, bank_rows, channels, BLOCK_K: tl.constexpr):
    """Return where the neighbours of a row start in the bank, which of them are there, and whether any is missing."""
    k = tl.arange(0, BLOCK_K)
    used = k < count
    index = tl.load(neighbors + row * count + k, mask=used, other=0)
    exists = (index >= 0) & (index < bank_rows)
    missing = tl.max(tl.where(used & (exists == 0), 1, 0), 0) > 0
    return tl.where(used & exists, index, 0) * channels, used & exists, missing


@triton.jit
def weights_of(query, bank, row, start, known, count, channels, ridge, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return the weights of a row's neighbours, by Gauss-Jordan elimination."""
    k = tl.arange(0, BLOCK_K)
    used = k < count
    gram = tl.zeros((BLOCK_K, BLOCK_K), tl.float32)
    for first in range(0, channels, BLOCK_C):
        channel = first + tl.arange(0, BLOCK_C)
        _, apart = differences(query, bank, row, start, known, channel, channels)
        gram += tl.sum(apart[:, None, :] * apart[None, :, :], 2)
    diagonal = k[:, None] == k[None, :]
    mean = tl.sum(tl.sum(tl.where(diagonal, gram, 0.0), 1), 0) / count
    scale = tl.where(mean < 1e-12, 1e-12, mean)  # NaN stays
    # Rows that are not used are those of the unit matrix, with 0 on the right.
    gram = gram / scale + tl.where(diagonal, tl.where(used, ridge, 1.0)[:, None], 0.0)
    right = tl.where(used, 1.0, 0.0)
    for step in range(0, count):
        pivot_row = tl.sum(tl.where((k == step)[:, None], gram, 0.0), 0)
        column = tl.sum(tl.where((k == step)[None, :], gram, 0.0), 1)
        pivot = tl.sum(tl.where(k == step, column, 0.0), 0)
        factor = tl.where(k == step, 0.0, column / pivot)
        value = tl.sum(tl.where(k == step, right, 0.0), 0)
        gram -= factor[:, None] * pivot_row[None, :]
        right -= factor * value
    weight = right / tl.sum(tl.where(diagonal, gram, 0.0), 1)
    return weight / tl.sum(weight, 0)


@triton.jit
def neighbor_regression_kernel(
    query, bank, neighbors, output, count, bank_rows, channels, ridge,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One row; BLOCK_K, at least ``count``, is a power of two."""
    channels = chunks(channels, bank.dtype)
    row = tl.program_id(0).to(tl.int64)
    start, known, missing = neighbors_of(neighbors, row, count, bank_rows, channels, BLOCK_K)
    weight = weights_of(query, bank, row, start, known, count, channels, ridge, BLOCK_K, BLOCK_C)
    for first in range(0, channels, BLOCK_C):
        channel = first + tl.arange(0, BLOCK_C)
        own, apart = differences(query, bank, row, start, known, channel, channels)
        # Weights sum to one: the combination is the row itself and the weighted differences.
        total = own + tl.sum(weight[:, None] * apart, 0)
        tl.store(output + row * channels + channel, tl.where(missing, float("nan"), total), mask=channel < channels)


REGRESSION = Tuned(
    neighbor_regression_kernel,
    {"any": (config(1, BLOCK_C=32), config(2, BLOCK_C=32), config(4, BLOCK_C=64))},
    key=("channels", "BLOCK_K"),
)
MAX_BLOCK = 16  # neighbours; the products of more do not fit into registers


def combined_rows(a: Arguments) -> Tensor:
    """Return the rows' combinations."""
    count = a.neighbors.shape[1]
    if count > MAX_BLOCK:
        return reference.neighbor_regression(a)
    query, bank, output = regression_arguments(a)
    if len(query):
        wrap_triton(REGRESSION())[(len(query),)](
            query, bank, a.neighbors.contiguous(), output, count, len(bank), query.shape[1], a.ridge,
            BLOCK_K=max(2, 1 << (count - 1).bit_length()),
        )  # fmt: skip
    return output[:, : a.query.shape[1]]


@operator
def neighbor_regression(a: Arguments) -> Tensor:
    """See :func:`bkd_fast.ops.neighbor_regression`. More than 16 neighbours are combined in plain PyTorch."""
    return combined_rows(a)
