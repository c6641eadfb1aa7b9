"""The mean of the largest values in Triton: a program has a row."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from bkd_fast.ops.layout import floats
from bkd_fast.ops.top_mean import Arguments
from bkd_fast.ops.triton_common import Tuned, bucket, config, operator


@triton.jit
def top_mean_kernel(values, mean, width, count, size, BLOCK: tl.constexpr):  # size: a bucket, for the tuning
    """Find the smallest value that counts by a radix select, byte after byte; then add up those above it."""
    row = tl.program_id(0).to(tl.int64)
    start = values + row * width
    digit = tl.arange(0, 256)
    found = tl.full((), 0, tl.int32)
    known = tl.full((), 0, tl.int32)  # bits of `found` that are final
    rank = tl.full((), 0, tl.int32) + count
    nan = tl.full((), 0, tl.int32)
    for step in range(0, 4):
        shift = 24 - 8 * step
        histogram = tl.zeros((256,), tl.int32)
        for first in range(0, width, BLOCK):
            place = first + tl.arange(0, BLOCK)
            value = tl.load(start + place, mask=place < width, other=0.0)
            nan = tl.maximum(nan, tl.max((value != value).to(tl.int32), 0))
            bits = value.to(tl.int32, bitcast=True)
            # Bits that are ordered, without a sign, as the numbers are.
            bits = bits ^ ((bits >> 31) | -2147483648)
            counted = (place < width) & (((bits ^ found) & known) == 0)
            histogram += tl.histogram((bits >> shift) & 255, 256, mask=counted)
        above = tl.sum(histogram, 0) - tl.cumsum(histogram, 0)  # counts of larger digits
        here = (above < rank) & (rank <= above + histogram)
        found = found | (tl.sum(tl.where(here, digit, 0), 0) << shift)
        known = known | (255 << shift)
        rank -= tl.sum(tl.where(here, above, 0), 0)
    sums = tl.zeros((BLOCK,), tl.float32)
    smallest = (found ^ ((~found >> 31) | -2147483648)).to(tl.float32, bitcast=True)
    for first in range(0, width, BLOCK):
        place = first + tl.arange(0, BLOCK)
        value = tl.load(start + place, mask=place < width, other=0.0)
        sums += tl.where((place < width) & (value > smallest), value, 0.0)
    # All that remain are equal to the smallest.
    total = tl.sum(sums, 0) + rank.to(tl.float32) * smallest
    tl.store(mean + row, tl.where(nan > 0, float("nan"), total / count))


TOP_MEAN = Tuned(
    top_mean_kernel,
    {"any": (config(4, BLOCK=1024), config(8, BLOCK=2048), config(16, BLOCK=4096))},
    key=("size",),
)


@operator
def top_mean(a: Arguments) -> Tensor:
    """See :func:`bkd_fast.ops.top_mean`."""
    rows, width = a.values.shape
    mean = floats((rows,), a.values)
    if rows:
        wrap_triton(TOP_MEAN())[(rows,)](a.values.float().contiguous(), mean, width, a.largest, bucket(width))
    return mean
