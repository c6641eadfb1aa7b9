"""Cases of ``nearest_rows``, and checks that the GPU backends must pass."""

from __future__ import annotations

import torch
from torch import Tensor

from bkd_fast.ops import backend
from bkd_fast.ops.nearest_rows import gpu, nearest_rows, prepare_rows

# Queries, channels, rows of the bank, how many.
SHAPES = {
    "some": (9, 24, 300, 5),
    "one": (19, 7, 40, 1),
    "all": (5, 3, 9, 9),
    "as many as a warp": (3, 5, 140, 32),
    "more than a warp": (4, 5, 129, 33),
    "all of two warps": (2, 33, 64, 64),
    "one query": (1, 40, 200, 16),
    "one row": (2, 4, 1, 1),
    "no queries": (0, 5, 4, 2),
}


def problem(name: str) -> tuple[Tensor, Tensor, int]:
    """Return queries, a bank and a count: whole numbers, whose distances are exact and often equal."""
    queries, channels, rows, count = SHAPES[name]
    generator = torch.Generator().manual_seed(0)
    query, bank = (torch.randint(-2, 3, (n, channels), generator=generator).float() for n in (queries, rows))
    return query, bank, count


def expected(query: Tensor, bank: Tensor, count: int) -> Tensor:
    """Return the nearest rows; of equally near ones the first."""
    return (query.unsqueeze(1) - bank).square().sum(2).sort(dim=1, stable=True).indices[:, :count]


def check(name: str, chosen: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
    """Assert that a backend finds the nearest rows in order, whether the bank is prepared or not."""
    query, bank, count = problem(name)
    own, rows = query.to(device, dtype), bank.to(device, dtype)
    with backend(chosen):
        for each in (rows, prepare_rows(rows)):
            assert torch.equal(nearest_rows(own, each, count).cpu(), expected(query, bank, count))


def check_parts(chosen: str, monkeypatch) -> None:
    """Assert that products that are not held at a time make no difference."""
    query, bank, count = problem("some")
    monkeypatch.setattr(gpu, "MAX_PRODUCTS", 4 * len(bank))
    with backend(chosen):
        assert torch.equal(nearest_rows(query, bank, count), expected(query, bank, count))


def check_not_finite(chosen: str, device: str = "cpu") -> None:
    """Assert that what is not finite stays in its row, where rows that exist are chosen, and NaN is never nearest."""
    query, bank, count = problem("some")
    want = expected(query, bank, count)
    query[1, 0], query[2, 0], query[3, 0] = torch.nan, torch.inf, -torch.inf
    bank = torch.cat([bank, torch.full_like(bank[:3], torch.nan)])
    with backend(chosen):
        index = nearest_rows(query.to(device), bank.to(device), count).cpu()
    assert ((index >= 0) & (index < len(bank))).all()
    rest = [0, *range(4, len(query))]
    assert torch.equal(index[rest], want[rest])
