"""The nearest features of support images in a window around each pixel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bkd_fast.ops.checks import check_shape, check_tensors
from bkd_fast.ops.registration import refuse_backward, register

MOST_RADIUS = 8


def local_match(query: Tensor, support: Tensor, shots: Tensor, radius: int) -> tuple[Tensor, Tensor]:
    """Return the distance of each pixel to the nearest one in a window of each support image, and where that lies.

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
            support in channels_last layout is read as it lies (on GPUs if a pixel's channels fill whole 16 bytes);
            any other is copied.
        shots: (N, k), int64, the support images that each query is matched with, 0 to P - 1. On the CPU they are
            checked. On other devices, where a check would have to wait, an image that is not there is never read:
            its distances are NaN.
        radius: of the window, in pixels, 0 to 8.

    Returns:
        distance (N, k, H, W) and displacement (N, k, 2, H, W), whole numbers of pixels; float32, or float64 for
        float64 features.

    Raises:
        TypeError, ValueError: the message names the argument, what it was and what it should be.
        IndexError: on the CPU, a shot that is no image of the support.
        RuntimeError: in backward.
    """
    name = "local_match"
    check_tensors(name, {"query": query, "support": support})
    check_shape(name, "query", query, ("N", "C", "H", "W"))
    if 0 in query.shape[1:]:
        raise ValueError(f"{name}: query has shape {tuple(query.shape)}, expected no size 0 but the batch")
    check_shape(name, "support", support, ("P", *query.shape[1:]))
    if not isinstance(shots, Tensor):
        raise TypeError(f"{name}: shots is of type {type(shots).__name__}, expected a tensor")
    if shots.dtype != torch.int64:
        raise TypeError(f"{name}: shots is {shots.dtype}, expected int64")
    check_shape(name, "shots", shots, (query.shape[0], "k"))
    if shots.device != query.device:
        raise ValueError(f"{name}: shots is on {shots.device} and query on {query.device}; move both to one device")
    if not isinstance(radius, int) or isinstance(radius, bool) or not 0 <= radius <= MOST_RADIUS:
        raise ValueError(f"{name}: radius is {radius!r}, expected an integer from 0 to {MOST_RADIUS}")
    return _match(query, support, shots, radius)


def _fake(query: Any, support: Any, shots: Any, radius: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    size = query.shape[2:]
    return query.new_empty((*shots.shape, *size), dtype=dtype), query.new_empty((*shots.shape, 2, *size), dtype=dtype)


SCHEMA = "(Tensor query, Tensor support, Tensor shots, int radius) -> (Tensor, Tensor)"
_match = register("local_match", SCHEMA, _fake)
refuse_backward(
    _match,
    "local_match has no gradient: its displacement is a choice, not a function that changes smoothly; call it under "
    "torch.no_grad(), or detach its inputs",
)
