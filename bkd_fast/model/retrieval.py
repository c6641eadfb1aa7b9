"""The support that suits a query: the k most similar of a pool of normal images, and their best combination."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

GRID = 4  # cells along each side of the deepest level that two images are compared by
STEPS = 12  # of conjugate gradients; the ridge keeps the systems so well conditioned that they have converged by then


class SupportPool(NamedTuple):
    """Normal images to choose from, as the forward branch sees them.

    ``features``: per level (P, H, W, C), float16. ``descriptors``: (P, D) float32, what queries are compared with.
    """

    features: list[Tensor]
    descriptors: Tensor


def describe(level: Tensor) -> Tensor:
    """What an image is compared by: its deepest level (N, C, H, W), averaged over a grid, as one row (N, D)."""
    return shrink(level).flatten(1)


def shrink(level: Tensor) -> Tensor:
    """A level averaged over the grid that descriptors are made of; shrinking it again changes nothing."""
    return F.adaptive_avg_pool2d(level, GRID)


def make_pool(levels: Sequence[Tensor]) -> SupportPool:
    """``levels``: per level (P, C, H, W)."""
    # The features of an image lie together, and a query reads those of a few: in half precision half as many bytes.
    features = [level.half().permute(0, 2, 3, 1).contiguous() for level in levels]
    return SupportPool(features, describe(features[-1].permute(0, 3, 1, 2).float()))


def nearest(query: Tensor, pool: SupportPool, shots: int, exclude: Tensor | None = None) -> Tensor:
    """Which images of the pool are most similar to each query: (N, k) int64, k at most ``shots``.

    Args:
        query: (N, D) descriptors.
        exclude: (N,) int64, the place in the pool of a query that is itself there, or -1.
    """
    # Squares without the query's own, which is the same for all.
    distance = pool.descriptors.square().sum(1) - 2 * query @ pool.descriptors.T
    size = len(pool.descriptors)
    if exclude is not None:
        itself = torch.arange(size, device=query.device) == exclude.unsqueeze(1)
        distance = distance.masked_fill(itself, torch.inf)
        size -= 1
    return distance.topk(min(shots, size), dim=1, largest=False).indices


def regression_weights(query: Tensor, shots: Tensor, ridge: float) -> Tensor:
    """Weights (N, k) that sum to one and combine k descriptors (N, k, D) to come closest to the query's (N, D).

    Least squares with a ridge of ``ridge`` times the mean squared distance of the shots: the larger, the closer the
    weights are to the plain mean's. (Locally linear embedding's weights; ridge regression of support features as in
    Wertheimer et al., CVPR 2021.)
    """
    apart = shots - query.unsqueeze(1)
    gram = apart @ apart.transpose(1, 2)
    scale = gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-12)
    gram = gram / scale[:, None, None] + ridge * torch.eye(shots.shape[1], device=shots.device)
    weights = _solved(gram)
    return weights / weights.sum(1, keepdim=True)


def _solved(gram: Tensor) -> Tensor:
    """gram^-1 1 for symmetric positive definite (N, k, k), by conjugate gradients: products that any run-time has."""
    solution = torch.zeros_like(gram[:, :, 0])
    residual = torch.ones_like(solution)
    direction, square = residual, residual.square().sum(1, keepdim=True)
    for _ in range(STEPS):
        image = (gram @ direction.unsqueeze(2)).squeeze(2)
        # Where it has converged both are zero, and the solution stays.
        step = square / (direction * image).sum(1, keepdim=True).clamp_min(1e-30)
        solution = solution + step * direction
        residual = residual - step * image
        before, square = square, residual.square().sum(1, keepdim=True)
        direction = residual + square / before.clamp_min(1e-30) * direction
    return solution


def retrieve(
    query: Tensor, pool: SupportPool, shots: int, ridge: float | None, exclude: Tensor | None = None
) -> list[Tensor]:
    """The support of each query, per level (N, k, C, H, W) channels-last.

    Args:
        query: deepest level of the queries (N, C, H, W).
        shots: how many images are chosen, where there are as many.
        ridge: combines the shots into one, k = 1 (see :func:`regression_weights`); None keeps them apart.
        exclude: see :func:`nearest`.
    """
    with torch.no_grad():
        descriptors = describe(query.float())
        chosen = nearest(descriptors, pool, shots, exclude)
        if ridge is None:
            return [features[chosen].float().permute(0, 1, 4, 2, 3) for features in pool.features]
        weights = regression_weights(descriptors, pool.descriptors[chosen], ridge)
        return [_combined(features, chosen, weights) for features in pool.features]


def _combined(features: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """(P, H, W, C), (N, k), (N, k) -> (N, 1, C, H, W)."""
    if features.is_cuda:
        shots = features[chosen].flatten(2).to(weights.dtype)
        combined = (weights.unsqueeze(1) @ shots).unflatten(2, features.shape[1:])
        return combined.permute(0, 1, 4, 2, 3)
    # Shot by shot, each stays in cache from its conversion to its sum: a tenth of the time with 512 channels.
    total = features.new_zeros(chosen.shape[0], *features.shape[1:], dtype=weights.dtype)
    for shot in range(chosen.shape[1]):
        total.addcmul_(features.index_select(0, chosen[:, shot]).to(weights.dtype), weights[:, shot, None, None, None])
    return total.permute(0, 3, 1, 2).unsqueeze(1)
