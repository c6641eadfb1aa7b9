"""The nearest features of support images in a window around each pixel."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from bkd_fast.ops.checks import check_index, check_index_tensor, check_shape, check_tensors, check_types
from bkd_fast.ops.registration import Result, register, wide

__all__ = ["local_match"]

MAX_RADIUS = 8


class Arguments(NamedTuple):
    """The operator's arguments, as its schema and every backend have them."""

    query: Tensor
    support: Tensor
    shots: Tensor
    radius: int


def local_match(query: Tensor, support: Tensor, shots: Tensor, radius: int) -> tuple[Tensor, Tensor]:
    """Return the distance of each pixel to the nearest one in a window of each support image, and its displacement.

    ``distance[n, j, y, x]`` is the smallest mean over the channels of
    ``(query[n, :, y, x] - support[shots[n, j], :, y + dy, x + dx])^2`` with dy and dx from -radius to radius, as in
    block matching; ``displacement[n, j, :, y, x]`` is its (dy, dx): an offset for a deformable convolution, as in the
    flow-guided alignment of BasicVSR++ (Chan et al., CVPR 2022). Positions outside the image are no candidates. Of
    equal distances the one with the smallest dy^2 + dx^2 is taken, then the first in row-major order. A distance that
    is NaN loses to any number; where all are NaN, the distance is NaN and the displacement 0.

    Arithmetic is float32 for half precision. There is no gradient: calling backward raises RuntimeError, so call it
    under ``torch.no_grad()`` where its inputs need one.

    Args:
        query: (N, C, H, W).
        support: (P, C, H, W), the features of P support images; may be of another dtype, float16 for instance. A
            support in channels_last layout is read in place (on GPUs if a pixel's channels fill whole 16 bytes);
            any other is copied.
        shots: (N, k), int64, the support images that each query is matched with, 0 to P - 1. On the CPU they are
            checked. On other devices, where a check would have to wait, an image that does not exist is never
            read: its distances are NaN.
        radius: of the window, in pixels, 0 to 8.

    Returns:
        distance (N, k, H, W) and displacement (N, k, 2, H, W), whole numbers of pixels; float32, or float64 for
        float64 features.

    Raises:
        TypeError, ValueError: the message names the argument, what was given and what was expected.
        IndexError: on the CPU, a shot that is no image of the support.
        RuntimeError: in backward.
    """
    check_types(_NAME, {"query": query, "support": support, "shots": shots})
    if not isinstance(radius, int) or isinstance(radius, bool):
        raise ValueError(f"{_NAME}: radius is {radius!r}, expected an integer from 0 to {MAX_RADIUS}")
    return _operator(query, support, shots, radius)


def _check(a: Arguments) -> None:
    check_tensors(_NAME, {"query": a.query, "support": a.support})
    check_shape(_NAME, "query", a.query, ("N", "C", "H", "W"))
    if 0 in a.query.shape[1:]:
        raise ValueError(f"{_NAME}: query has shape {tuple(a.query.shape)}, expected no size 0 but the batch")
    check_shape(_NAME, "support", a.support, ("P", *a.query.shape[1:]))
    check_index_tensor(_NAME, "shots", a.shots, "query", a.query)
    check_shape(_NAME, "shots", a.shots, (a.query.shape[0], "k"))
    check_index(_NAME, "query", a.query.shape[2:])
    if not 0 <= a.radius <= MAX_RADIUS:
        raise ValueError(f"{_NAME}: radius is {a.radius!r}, expected an integer from 0 to {MAX_RADIUS}")


def _results(a: Arguments) -> list[Result]:
    dtype = wide(a.query)
    size = a.query.shape[2:]
    return [Result((*a.shots.shape, *size), dtype), Result((*a.shots.shape, 2, *size), dtype)]


_NAME = "local_match"
_operator = register(
    _NAME, Arguments, check=_check, results=_results, outputs=2,
    gradient="local_match has no gradient: its displacement is a choice, not a function that changes smoothly; call it "
    "under torch.no_grad(), or detach its inputs",
)  # fmt: skip
