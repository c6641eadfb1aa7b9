"""The best combination of a few neighbours: least squares in closed form, batched over many small systems."""

from __future__ import annotations

import torch
from torch import Tensor

RIDGE = 0.3  # in units of the neighbours' mean squared distance


def regression_weights(query: Tensor, neighbors: Tensor, ridge: float = RIDGE) -> Tensor:
    """Return weights (N, k) that sum to one and combine k neighbours (N, k, D) to come closest to the query's (N, D).

    Least squares with a ridge of ``ridge`` times the mean squared distance: the larger, the closer the weights are to
    the plain mean's. (The weights of locally linear embedding, Roweis and Saul, Science 2000.)
    """
    apart = neighbors - query.unsqueeze(1)
    gram = apart @ apart.transpose(1, 2)
    scale = gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-12)
    unit = torch.eye(neighbors.shape[1], dtype=gram.dtype, device=gram.device)
    gram = gram / scale[:, None, None] + ridge * unit
    weights = _solved(gram)
    return weights / weights.sum(1, keepdim=True)


def _solved(gram: Tensor) -> Tensor:
    """gram^-1 1 for symmetric positive definite (N, k, k), by conjugate gradients: products that any run-time has."""
    solution = torch.zeros_like(gram[:, :, 0])
    residual = torch.ones_like(solution)
    direction, square = residual, residual.square().sum(1, keepdim=True)
    for _ in range(gram.shape[1]):  # exact after so many steps
        image = (gram @ direction.unsqueeze(2)).squeeze(2)
        # Where it has converged both are zero, and the solution stays.
        step = square / (direction * image).sum(1, keepdim=True).clamp_min(1e-30)
        solution = solution + step * direction
        residual = residual - step * image
        before, square = square, residual.square().sum(1, keepdim=True)
        direction = residual + square / before.clamp_min(1e-30) * direction
    return solution
