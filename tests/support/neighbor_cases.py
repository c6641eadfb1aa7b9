"""Cases of ``neighbor_regression`` and ``select_matches``, and checks that every backend must pass."""

from __future__ import annotations

import torch
from torch import Tensor

from bkd_fast.ops import backend
from bkd_fast.ops.neighbor_regression import neighbor_regression
from bkd_fast.ops.neighbor_regression.reference import combined
from bkd_fast.ops.select_matches import select_matches
from bkd_fast.ops.select_matches.reference import selected

# Rows, channels, rows of the bank, neighbours.
REGRESSIONS = {
    "few neighbours": (300, 24, 40, 5),
    "one neighbour": (9, 16, 7, 1),
    "as many as registers hold": (11, 40, 20, 6),
    "more than registers hold": (13, 33, 40, 7),
    "many neighbours": (3, 19, 70, 16),
    "one row of many channels": (1, 1100, 20, 16),
    "odd channels": (70, 7, 30, 3),
    "a bank that is smaller than a neighbourhood": (5, 8, 2, 4),
    "no rows": (0, 8, 3, 2),
}
# Queries, shots, height, width, count.
MATCHES = {
    "some": (2, 16, 5, 7, 5),
    "all": (2, 3, 4, 5, 3),
    "one": (1, 4, 3, 33, 1),
    "many": (1, 70, 2, 9, 64),
    "no queries": (0, 2, 3, 4, 1),
}


def regression(name: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, bank and neighbours."""
    rows, channels, images, count = REGRESSIONS[name]
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(rows, channels, generator=generator)
    bank = torch.randn(images, channels, generator=generator).to(dtype)
    return query, bank, torch.randint(images, (rows, count), generator=generator)


def matches(name: str) -> tuple[Tensor, Tensor, Tensor, int]:
    """Return distances, many of them equal and some NaN, displacements, shots and a count."""
    queries, shots, height, width, count = MATCHES[name]
    generator = torch.Generator().manual_seed(0)
    distance = torch.randint(0, 6, (queries, shots, height, width), generator=generator).float()
    distance[torch.rand(distance.shape, generator=generator) > 0.8] = torch.nan
    displacement = torch.randint(-2, 3, (queries, shots, 2, height, width), generator=generator).float()
    return distance, displacement, torch.randint(9, (queries, shots), generator=generator), count


def exact_weights(query: Tensor, neighbors: Tensor, ridge: float) -> Tensor:
    """Return (G / g + ridge I)^-1 1, scaled to sum 1, in float64 by LAPACK; neighbors (R, K, C)."""
    difference = (neighbors - query.unsqueeze(1)).double()
    gram = difference @ difference.mT
    scale = gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    system = gram / scale + ridge * torch.eye(neighbors.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(system, torch.ones_like(system[:, :, :1])).squeeze(2)
    return weights / weights.sum(1, keepdim=True)


def check_regression(name: str, chosen: str, dtype: torch.dtype, device: str = "cpu") -> None:
    """Assert that a backend is as exact as float32 allows, whatever the bank's dtype."""
    query, bank, neighbors = regression(name, dtype)
    with backend(chosen):
        result = neighbor_regression(query.to(device), bank.to(device), neighbors.to(device)).cpu()
    assert result.dtype == torch.float32
    exact = combined(query.double(), bank.double(), neighbors, 0.3).float()
    torch.testing.assert_close(result, exact, rtol=1e-4, atol=2e-5 if neighbors.shape[1] <= 7 else 2e-4)


def check_matches(name: str, chosen: str, device: str = "cpu") -> None:
    """Assert that a backend selects what the reference does, ties and NaN included."""
    *tensors, count = matches(name)
    with backend(chosen):
        result = select_matches(*(tensor.to(device) for tensor in tensors), count).cpu()
    assert torch.equal(result, selected(*tensors, count))


def check_missing_rows(chosen: str, device: str = "cpu") -> None:
    """Assert that a row that is not in the bank is not read: the result is NaN, and others are not touched."""
    for name in ("few neighbours", "many neighbours"):
        query, bank, neighbors = regression(name)
        expected = combined(query, bank, neighbors, 0.3)
        neighbors[1, 0], neighbors[2, -1] = -1, 2**40
        with backend(chosen):
            result = neighbor_regression(query.to(device), bank.to(device), neighbors.to(device)).cpu()
        assert result[1:3].isnan().all()
        torch.testing.assert_close(result[3:], expected[3:], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(result[0], expected[0], rtol=1e-3, atol=1e-3)


def check_not_a_number(chosen: str, device: str = "cpu") -> None:
    """Assert that NaN in one row stays in that row's result."""
    for name in ("few neighbours", "many neighbours"):
        query, bank, neighbors = regression(name)
        query[1, 0] = torch.nan
        with backend(chosen):
            result = neighbor_regression(query.to(device), bank.to(device), neighbors.to(device)).cpu()
        assert result[1].isnan().all()
        assert not result[[0, 2]].isnan().any()
