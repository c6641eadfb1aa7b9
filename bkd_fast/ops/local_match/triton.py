"""Matching in a window in Triton: a program has a block of pixels of one query and one support image."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from bkd_fast.ops.local_match import Arguments
from bkd_fast.ops.local_match.gpu import match_images, match_results
from bkd_fast.ops.triton_common import Tuned, bucket, config, operator
from bkd_fast.ops.triton_sampling import chunks


@triton.jit
def local_match_kernel(
    query, support, shots, distance, displacement,
    count, images, channels, own, height, width, radius, problem,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Distance and displacement of a block of pixels; ``count`` shots a query, ``own`` channels without zeros.

    A shot that is no image of the support has no candidates.
    """
    channels = chunks(channels, support.dtype)
    pixels = height * width
    blocks = tl.cdiv(pixels, BLOCK_P)
    pair = (tl.program_id(0) // blocks).to(tl.int64)
    pixel = tl.program_id(0) % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    valid = pixel < pixels
    y = pixel // width
    x = pixel - y * width
    shot = tl.load(shots + pair)
    exists = (shot >= 0) & (shot < images)
    known = valid & exists
    at = pair // count * pixels + pixel
    start = tl.where(exists, shot, 0) * pixels + pixel
    smallest = tl.zeros((BLOCK_P,), tl.float32)
    rank = tl.full((BLOCK_P,), -1, tl.int32)  # of the best move: shortest, then row-major; -1 = of nothing yet
    best_y = tl.zeros((BLOCK_P,), tl.float32)
    best_x = tl.zeros((BLOCK_P,), tl.float32)
    side = 2 * radius + 1
    for move in range(0, side * side):
        dy = move // side - radius
        dx = move % side - radius
        there = known & (y + dy >= 0) & (y + dy < height) & (x + dx >= 0) & (x + dx < width)
        other = start + (dy * width + dx)
        total = tl.zeros((BLOCK_P,), tl.float32)
        for first in range(0, channels, BLOCK_C):
            channel = first + tl.arange(0, BLOCK_C)
            within = there[:, None] & (channel < channels)[None, :]
            q = tl.load(query + (at[:, None] * channels + channel[None, :]), mask=within, other=0.0)
            s = tl.load(support + (other[:, None] * channels + channel[None, :]), mask=within, other=0.0).to(tl.float32)
            total += tl.sum((q - s) * (q - s), 1)
        own_rank = (dy * dy + dx * dx) * 1024 + move
        better = (rank < 0) | (total < smallest) | ((total == smallest) & (own_rank < rank))
        better = better & there & (total == total)
        smallest = tl.where(better, total, smallest)
        rank = tl.where(better, own_rank, rank)
        best_y = tl.where(better, dy.to(tl.float32), best_y)
        best_x = tl.where(better, dx.to(tl.float32), best_x)
    mean = tl.where(rank < 0, float("nan"), smallest / own)
    tl.store(distance + pair * pixels + pixel, mean, mask=valid)
    tl.store(displacement + 2 * pair * pixels + pixel, best_y, mask=valid)
    tl.store(displacement + (2 * pair + 1) * pixels + pixel, best_x, mask=valid)


MATCH = Tuned(
    local_match_kernel,
    {
        "any": (
            config(4, BLOCK_P=32, BLOCK_C=32),
            config(4, BLOCK_P=16, BLOCK_C=64),
            config(8, BLOCK_P=32, BLOCK_C=64),
            config(8, BLOCK_P=16, BLOCK_C=128),
        )
    },
    key=("channels", "radius", "problem"),
)


def window_match(a: Arguments) -> tuple[Tensor, Tensor]:
    """Return the distance and displacement."""
    own, images = match_images(a.query, a.support)
    distance, displacement = match_results(a.query, a.shots)
    count, pixels = distance.numel(), a.query.shape[2] * a.query.shape[3]
    if not count:
        return distance, displacement
    wrap_triton(MATCH())[lambda meta: (triton.cdiv(pixels, meta["BLOCK_P"]) * a.shots.numel(),)](
        own, images, a.shots.contiguous(), distance, displacement,
        a.shots.shape[1], len(images), own.shape[1], a.query.shape[1], *a.query.shape[2:], a.radius, bucket(count),
    )  # fmt: skip
    return distance, displacement


@operator
def local_match(a: Arguments) -> tuple[Tensor, Tensor]:
    """See :func:`bkd_fast.ops.local_match`."""
    return window_match(a)
