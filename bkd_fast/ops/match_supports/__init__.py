"""Supports matched to queries pixel by pixel, and combined."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bkd_fast.ops.checks import check_index, check_index_tensor, check_shape, check_tensors, check_types, named
from bkd_fast.ops.local_match import MAX_RADIUS
from bkd_fast.ops.neighbor_regression import RIDGE
from bkd_fast.ops.registration import Result, no_gradient, register, wide

__all__ = ["match_supports"]

MAX_SHOTS = 64


class Arguments(NamedTuple):
    """The operator's arguments, as its schema and every backend have them."""

    queries: list[Tensor]
    supports: list[Tensor]
    shots: Tensor
    radius: int
    neighbors: int
    ridge: float


def match_supports(
    queries: Sequence[Tensor],
    supports: Sequence[Tensor],
    shots: Tensor,
    radius: int,
    neighbors: int,
    ridge: float = RIDGE,
) -> list[Tensor]:
    """Return for each view the support of every query, aligned by search.

    Of each of its shots a pixel of a query takes the feature that :func:`bkd_fast.ops.local_match.local_match` finds.
    The ``neighbors`` nearest of these (:func:`bkd_fast.ops.select_matches.select_matches`) are combined by
    :func:`bkd_fast.ops.neighbor_regression.neighbor_regression`; one alone is taken as it is. There is no gradient.

    Args:
        queries: L views (N, C_l, H_l, W_l).
        supports: their supports (P, C_l, H_l, W_l), all of one dtype, which may be another; in channels_last layout
            they are read in place (on GPUs if a pixel's channels fill whole 16 bytes).
        shots: (N, k) int64, k from 1 to 64, the images that each query is matched with, 0 to P - 1. On the CPU they are
            checked. On other devices an image that does not exist is never read: what is made of it is NaN.
        radius: of the window, in pixels, 0 to 8.
        neighbors: 1 to k.
        ridge: of the combination, 1e-6 to 1e6.

    Returns:
        L tensors (N, C_l, H_l, W_l), channels_last; float32, or float64 for float64 queries.

    Raises:
        TypeError, ValueError: the message names the argument, what was given and what was expected.
        IndexError: on the CPU, a shot that is no image of the supports.
        RuntimeError: in backward.
    """
    check_types(_NAME, {"shots": shots, **named("queries", queries), **named("supports", supports)})
    for name, value in (("radius", radius), ("neighbors", neighbors)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{_NAME}: {name} is {value!r}, expected an integer")
    return _operator(list(queries), list(supports), shots, radius, neighbors, float(ridge))


def in_turn(
    a: Arguments,
    match: Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]],
    select: Callable[[Tensor, Tensor, Tensor, int], Tensor],
    combine: Callable[[Tensor, Tensor, Tensor, float], Tensor],
) -> list[Tensor]:
    """Return the results by three functions, with the arguments of the operators that they are named after."""
    results = []
    for query, support in zip(a.queries, a.supports, strict=True):
        distance, displacement = match(query, support, a.shots, a.radius)
        positions = select(distance, displacement, a.shots, a.neighbors)
        flat = support.permute(0, 2, 3, 1).flatten(0, 2)  # (P * H * W, C), a view of a channels_last support
        if a.neighbors > 1:
            features = combine(query.permute(0, 2, 3, 1).flatten(0, 2), flat, positions.flatten(0, 2), a.ridge)
        else:
            features = _taken(flat, positions.flatten()).to(wide(query))
        results.append(features.view(*positions.shape[:3], query.shape[1]).permute(0, 3, 1, 2))
    return results


def _taken(rows: Tensor, index: Tensor) -> Tensor:
    """Return rows; on other devices than the CPU, where nothing is checked, NaN for those that do not exist."""
    if index.device.type == "cpu":
        return rows[index]
    exists = (index >= 0) & (index < len(rows))
    rows = rows if len(rows) else rows.new_zeros(1, rows.shape[1])
    return rows[index.clamp(0, len(rows) - 1)].masked_fill(~exists.unsqueeze(1), torch.nan)


def _check(a: Arguments) -> None:
    if not a.queries:
        raise ValueError(f"{_NAME}: queries is empty, expected at least one view")
    if len(a.supports) != len(a.queries):
        raise ValueError(
            f"{_NAME}: supports has {len(a.supports)} tensors, expected {len(a.queries)}, one for each view"
        )
    queries, supports = named("queries", a.queries), named("supports", a.supports)
    check_tensors(_NAME, {**queries, **supports})
    batch, images = a.queries[0].shape[0], a.supports[0].shape[0]
    for (name, query), (other, support) in zip(queries.items(), supports.items(), strict=True):
        check_shape(_NAME, name, query, (batch, "C", "H", "W"))
        if 0 in query.shape[1:]:
            raise ValueError(f"{_NAME}: {name} has shape {tuple(query.shape)}, expected no size 0 but the batch")
        check_shape(_NAME, other, support, (images, *query.shape[1:]))
        check_index(_NAME, name, query.shape[2:])
        if query.dtype != a.queries[0].dtype:
            raise TypeError(f"{_NAME}: {name} is {query.dtype} and queries[0] is {a.queries[0].dtype}")
        if support.dtype != a.supports[0].dtype:
            raise TypeError(f"{_NAME}: {other} is {support.dtype} and supports[0] is {a.supports[0].dtype}")
    check_index_tensor(_NAME, "shots", a.shots, "queries[0]", a.queries[0])
    check_shape(_NAME, "shots", a.shots, (batch, "k"))
    count = a.shots.shape[1]
    if not 1 <= count <= MAX_SHOTS:
        raise ValueError(f"{_NAME}: shots has shape {tuple(a.shots.shape)}, expected 1 to {MAX_SHOTS} shots a query")
    if not 0 <= a.radius <= MAX_RADIUS:
        raise ValueError(f"{_NAME}: radius is {a.radius!r}, expected an integer from 0 to {MAX_RADIUS}")
    if not 1 <= a.neighbors <= count:
        raise ValueError(f"{_NAME}: neighbors is {a.neighbors!r}, expected an integer from 1 to {count}")
    if not 1e-6 <= a.ridge <= 1e6:
        raise ValueError(f"{_NAME}: ridge is {a.ridge!r}, expected a number from 1e-6 to 1e6")


def _results(a: Arguments) -> list[Result]:
    return [Result(query.shape, wide(query), torch.channels_last) for query in a.queries]


_NAME = "match_supports"
_operator = register(_NAME, Arguments, check=_check, results=_results, outputs=None, gradient=no_gradient(_NAME))
