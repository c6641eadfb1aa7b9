"""The support that suits a query: the k most similar of a bank of normal images, matched to it pixel by pixel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bkd_fast.model.regression import regression_weights
from bkd_fast.ops import local_match

GRID = 4  # cells along each side of the deepest level that two images are compared by


class SupportPool(NamedTuple):
    """Normal images to choose from, as the forward branch sees them.

    ``features``: per view (P, C, H, W), float16, channels_last. ``descriptors``: (P, D) float32, what queries are
    compared with. ``squares``: (P,), their squared norms.
    """

    features: list[Tensor]
    descriptors: Tensor
    squares: Tensor


def describe(level: Tensor) -> Tensor:
    """Return what images are compared by: their deepest level (N, C, H, W), averaged over a grid, as rows (N, D)."""
    return shrink(level).flatten(1)


def shrink(level: Tensor) -> Tensor:
    """Return a level averaged over the grid that descriptors are made of; shrinking it again changes nothing."""
    return F.adaptive_avg_pool2d(level, GRID)


def make_pool(views: Sequence[Tensor], descriptors: Tensor) -> SupportPool:
    """Return the bank of P images from their views (P, C, H, W) and descriptors (P, D)."""
    # The features of an image lie together, and a query reads those of a few: in half precision half as many bytes.
    features = [view.half().contiguous(memory_format=torch.channels_last) for view in views]
    return SupportPool(features, descriptors, descriptors.square().sum(1))


def nearest(query: Tensor, pool: SupportPool, shots: int, exclude: Tensor | None = None) -> Tensor:
    """Return which images of the bank are most similar to each query: (N, k) int64, k at most ``shots``.

    Args:
        query: (N, D) descriptors.
        exclude: (N, P) bool, images that a query must not choose; every row leaves as many.
    """
    # Squares without the query's own, which is the same for all.
    distance = pool.squares - 2 * query @ pool.descriptors.T
    size = len(pool.descriptors)
    if exclude is not None:
        distance = distance.masked_fill(exclude, torch.inf)
        size -= int(exclude.sum(1).max())
    return distance.topk(min(shots, size), dim=1, largest=False).indices


def residual(query: Tensor, pool: SupportPool, chosen: Tensor) -> Tensor:
    """Return how far each whole image is from the best combination of its shots (N,): mean squared difference.

    Args:
        query: (N, D) descriptors.
        chosen: (N, k), see :func:`nearest`.
    """
    shots = pool.descriptors[chosen]
    combined = (regression_weights(query, shots).unsqueeze(1) @ shots).squeeze(1)
    return (query - combined).square().mean(1)


@torch.no_grad()
def matched(query: Sequence[Tensor], pool: SupportPool, chosen: Tensor, radius: int, neighbors: int) -> list[Tensor]:
    """Return the support of each query, aligned by search: per view (N, C, H, W).

    Of each shot a pixel takes the feature that is closest in squared distance, within a window of ``2 radius + 1``
    feature pixels around its own position; the ``neighbors`` closest shots are combined by least squares.

    Args:
        query: the queries' views (N, C, H, W).
        chosen: (N, k), see :func:`nearest`.
    """
    count = min(neighbors, chosen.shape[1])
    return [_combined(view, bank, chosen, radius, count) for view, bank in zip(query, pool.features, strict=True)]


def _combined(query: Tensor, bank: Tensor, chosen: Tensor, radius: int, neighbors: int) -> Tensor:
    distance, displacement = local_match(query, bank, chosen, radius)
    shots = distance.topk(neighbors, dim=1, largest=False).indices  # (N, K, H, W)
    images = chosen[:, :, None, None].expand_as(distance).gather(1, shots)
    moves = displacement.gather(1, shots.unsqueeze(2).expand(-1, -1, 2, -1, -1)).long()
    height, width = query.shape[-2:]
    rows = torch.arange(height, device=query.device).unsqueeze(1) + moves[:, :, 0]
    columns = torch.arange(width, device=query.device) + moves[:, :, 1]
    places = ((images * height + rows) * width + columns).permute(0, 2, 3, 1)
    flat = bank.permute(0, 2, 3, 1).flatten(0, 2)  # (P * H * W, C), a view of a channels_last bank
    found = flat[places.flatten(0, 2)].to(query.dtype)  # (N * H * W, K, C)
    if neighbors > 1:
        weights = regression_weights(query.permute(0, 2, 3, 1).flatten(0, 2), found)
        found = weights.unsqueeze(1) @ found
    return found.view(*places.shape[:3], -1).permute(0, 3, 1, 2)
