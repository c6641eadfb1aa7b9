"""Problems for ``join_levels``, and what holds on every backend."""

from __future__ import annotations

import torch
from torch import Tensor

from bkd_fast.ops import backend
from bkd_fast.ops.join_levels import Arguments, join_levels
from bkd_fast.ops.join_levels.reference import joined

# (C, H, W) of each level, size of the result.
SHAPES = {
    "a finer, an equal and a coarser level": (((24, 8, 12), (40, 4, 6), (112, 2, 3)), (4, 6)),
    "odd channels": (((3, 8, 8), (7, 4, 4), (5, 2, 2)), (4, 4)),
    "blocks that are cut off": (((4, 7, 11), (8, 4, 6)), (4, 6)),
    "blocks that do not fit": (((4, 11, 7), (8, 4, 3)), (4, 3)),
    "a wide level": (((5, 4, 9), (6, 4, 3)), (4, 3)),
    "one pixel": (((4, 1, 1), (8, 3, 2)), (3, 2)),
    "more than a block": (((16, 40, 40), (12, 20, 20)), (20, 20)),
    "more levels than a launch has": (tuple((index + 1, 3, 3) for index in range(10)), (3, 3)),
}


def problem(name: str, dtype: torch.dtype = torch.float32, batch: int = 2) -> Arguments:
    """Return the operator's arguments; levels in either layout."""
    shapes, size = SHAPES[name]
    generator = torch.Generator().manual_seed(0)
    levels = [torch.randn(batch, *shape, generator=generator).to(dtype) for shape in shapes]
    levels[0] = levels[0].contiguous(memory_format=torch.channels_last)
    return Arguments(levels, [1 + index / 4 for index in range(len(levels))], list(size))


def run(a: Arguments, chosen: str, device: str = "cpu") -> Tensor:
    """Return the result of a backend, on the CPU."""
    with backend(chosen):
        return join_levels([level.to(device) for level in a.levels], a.factors, a.size).cpu()


def check(name: str, chosen: str, dtype: torch.dtype, device: str = "cpu") -> None:
    """Assert that a backend computes what the reference does."""
    a = problem(name, dtype)
    result = run(a, chosen, device)
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert result.is_contiguous(memory_format=torch.channels_last)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    expected = joined([level.double() for level in a.levels], a.factors, a.size)
    torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance)
    empty = run(problem(name, dtype, batch=0), chosen, device)
    assert empty.shape == (0, *result.shape[1:])
