"""The supports that a query is compared with: fixed ones, or a bank of normal images from which each query retrieves.

A support is one object with one method, ``for_query``; nobody asks which kind it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from bkd_fast.config import RetrievedSupport
from bkd_fast.model.alignment import AlignmentPyramid, PreparedLevel
from bkd_fast.ops.grid_means import grid_means
from bkd_fast.ops.match_supports import match_supports
from bkd_fast.ops.nearest_rows import PreparedRows, half_squares, nearest_rows
from bkd_fast.ops.neighbor_residual import neighbor_residual

GRID = 4  # cells along each side of the deepest level that two images are compared by


class Query(NamedTuple):
    """A batch of queries: the teacher's ``levels`` (N, C_l, H_l, W_l), and the ``views`` that are compared."""

    levels: Sequence[Tensor]
    views: Sequence[Tensor]


class Exclude(NamedTuple):
    """What each query must not be compared with: ``supports`` (N, P) and ``items`` (N, I), bool; None: nothing."""

    supports: Tensor | None
    items: Tensor | None


class QuerySupport(NamedTuple):
    """The supports of a batch of queries.

    ``levels``: per view, what the alignment takes. ``distance`` (N,): of each whole image from the best combination of
    its supports, where queries retrieve them. ``expected`` (N, 2): what to take off the logarithms of map and distance.
    ``shots`` (N, k): which images of the bank they are.
    """

    levels: list[PreparedLevel]
    distance: Tensor | None
    expected: Tensor | None = None
    shots: Tensor | None = None


class Support(Protocol):
    """Normal images that queries are compared with."""

    def for_query(self, query: Query, alignment: AlignmentPyramid, exclude: Exclude | None = None) -> QuerySupport:
        """Return the supports of each query."""


class FixedSupport(NamedTuple):
    """The same support for all queries, prepared once for weights that no longer change."""

    levels: list[PreparedLevel]

    def for_query(self, query: Query, alignment: AlignmentPyramid, exclude: Exclude | None = None) -> QuerySupport:
        """Return the prepared levels."""
        return QuerySupport(self.levels, None)


class SampledViews(NamedTuple):
    """The support of a training step, prepared with the weights of that step: per view (B, k, C, H, W), B = 1 or N."""

    views: list[Tensor]

    def for_query(self, query: Query, alignment: AlignmentPyramid, exclude: Exclude | None = None) -> QuerySupport:
        """Return the prepared levels; gradients flow through them."""
        return QuerySupport(alignment.prepare(self.views), None)


class SupportBank(NamedTuple):
    """P normal images to retrieve from.

    ``features``: per view (P, C, H, W), float16, channels_last. ``rows``: the descriptors (P, D), float32, that queries
    are compared with. ``expected``: (P, 2), what to take off the logarithms of the map's and the whole image's distance
    for queries that resemble each image.
    """

    features: list[Tensor]
    rows: PreparedRows
    expected: Tensor

    @property
    def descriptors(self) -> Tensor:
        """What queries are compared with: (P, D)."""
        return self.rows.rows

    def for_query(self, query: Query, alignment: AlignmentPyramid, exclude: Exclude | None = None) -> QuerySupport:
        """Return the most similar images of the bank, matched to each query pixel by pixel."""
        config = alignment.support
        assert isinstance(config, RetrievedSupport)
        neighbors = config.neighbors if config.aggregation == "regression" else 1
        with torch.no_grad():
            descriptors = describe(query.levels[-1].float())
            chosen = nearest(descriptors, self, config.shots, None if exclude is None else exclude.supports)
            views = matched(query.views, self, chosen, config.match_radius, neighbors)
            distance, expected = residual(descriptors, self, chosen)
        levels = alignment.prepare([view.unsqueeze(1) for view in views], shared=False)
        return QuerySupport(levels, distance, expected, chosen)


def describe(level: Tensor) -> Tensor:
    """Return what images are compared by: their deepest level (N, C, H, W), averaged over a grid, as rows (N, D)."""
    return grid_means(level, GRID)


def shrink(level: Tensor) -> Tensor:
    """Return a level averaged over the grid that descriptors are made of; shrinking it again changes nothing."""
    return F.adaptive_avg_pool2d(level, GRID)


def make_bank(views: Sequence[Tensor], descriptors: Tensor, expected: Tensor | None = None) -> SupportBank:
    """Return the bank of P images from their views (P, C, H, W) and descriptors (P, D); ``expected``: zeros if None."""
    if expected is None:
        expected = descriptors.new_zeros(len(descriptors), 2)
    # An image's features are contiguous, and a query reads those of a few: half precision halves the traffic.
    features = [view.half().contiguous(memory_format=torch.channels_last) for view in views]
    # Not rounded: few queries are compared at a time.
    return SupportBank(features, PreparedRows(descriptors, half_squares(descriptors), None), expected)


def nearest(query: Tensor, bank: SupportBank, shots: int, exclude: Tensor | None = None) -> Tensor:
    """Return which images of the bank are most similar to each query: (N, k) int64, k at most ``shots``.

    Args:
        query: (N, D) descriptors.
        exclude: (N, P) bool, images that a query must not choose; every row leaves equally many.
    """
    size = len(bank.descriptors)
    if exclude is None:
        return nearest_rows(query, bank.rows, min(shots, size))
    size -= int(exclude.sum(1).max())
    # Half the squares without the query's own, which is the same for all.
    distance = bank.rows.half_squares - query @ bank.descriptors.T
    return distance.masked_fill(exclude, torch.inf).topk(min(shots, size), dim=1, largest=False).indices


def residual(query: Tensor, bank: SupportBank, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the shots of whole images say of them.

    Args:
        query: (N, D) descriptors.
        chosen: (N, k), see :func:`nearest`.

    Returns:
        The distance (N,) from the best combination of the shots, the mean squared difference; and the mean (N, 2) of
        what the bank expects of the shots.
    """
    return neighbor_residual(query, bank.descriptors, chosen, bank.expected)


@torch.no_grad()
def matched(query: Sequence[Tensor], bank: SupportBank, chosen: Tensor, radius: int, neighbors: int) -> list[Tensor]:
    """Return the support of each query, aligned by search: per view (N, C, H, W).

    Of each shot a pixel takes the feature with the smallest squared distance, within a window of ``2 radius + 1``
    feature pixels around its own position; the ``neighbors`` closest shots are combined by least squares.

    Args:
        query: the queries' views (N, C, H, W).
        chosen: (N, k), see :func:`nearest`.
    """
    return match_supports(query, bank.features, chosen, radius, min(neighbors, chosen.shape[1]))
