"""The pixels that match best in Triton: a program has a block of pixels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from bkd_fast.ops.select_matches import Arguments
from bkd_fast.ops.triton_common import Tuned, config, operator


@triton.jit
def select_matches_kernel(
    distance, displacement, shots, positions, queries, count, matches, height, width, BLOCK_P: tl.constexpr
):
    """Go over ``count`` shots once for each of the ``matches``: the nearest one that comes after the last."""
    pixels = height * width
    result = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    valid = result < queries.to(tl.int64) * pixels
    query = result // pixels
    pixel = result - query * pixels
    y = pixel // width
    x = pixel - y * width
    last = tl.zeros((BLOCK_P,), tl.float32)
    last_shot = tl.full((BLOCK_P,), -1, tl.int32)
    for match in range(0, matches):
        nearest = tl.zeros((BLOCK_P,), tl.float32)
        shot = tl.full((BLOCK_P,), -1, tl.int32)
        for s in range(0, count):
            other = tl.load(distance + (query * count + s) * pixels + pixel, mask=valid, other=0.0)
            # NaN is behind every number, and of equal distances the first shot is in front.
            nan = other != other
            later = tl.where(
                (last != last) == nan, (last < other) | (((last == other) | nan) & (last_shot < s)), nan
            ) | (last_shot < 0)
            nearer = tl.where((nearest != nearest) == nan, other < nearest, nan == 0) | (shot < 0)
            take = later & nearer
            nearest = tl.where(take, other, nearest)
            shot = tl.where(take, s, shot)
        last = nearest
        last_shot = shot
        pair = query * count + shot
        moved = displacement + 2 * pair * pixels + pixel
        row = y + tl.load(moved, mask=valid, other=0.0).to(tl.int64)
        column = x + tl.load(moved + pixels, mask=valid, other=0.0).to(tl.int64)
        image = tl.load(shots + pair, mask=valid, other=0)
        tl.store(positions + result * matches + match, (image * height + row) * width + column, mask=valid)


SELECT = Tuned(
    select_matches_kernel, {"any": (config(4, BLOCK_P=128), config(4, BLOCK_P=256))}, key=("count", "matches")
)


def best_positions(a: Arguments) -> Tensor:
    """Return the positions."""
    batch, shots, height, width = a.distance.shape
    positions = torch.empty((batch, height, width, a.matches), dtype=torch.int64, device=a.distance.device)
    pixels = batch * height * width
    if pixels:
        distance, displacement = (tensor.float().contiguous() for tensor in (a.distance, a.displacement))
        wrap_triton(SELECT())[lambda meta: (triton.cdiv(pixels, meta["BLOCK_P"]),)](
            distance, displacement, a.shots.contiguous(), positions, batch, shots, a.matches, height, width
        )
    return positions


@operator
def select_matches(a: Arguments) -> Tensor:
    """See :func:`bkd_fast.ops.select_matches`."""
    return best_positions(a)
