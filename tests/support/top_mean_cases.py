"""Problems for ``top_mean``, and what holds on every backend."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bkd_fast.ops import backend
from bkd_fast.ops.top_mean import top_mean

# Rows, values in a row, count.
SHAPES = {
    "some": (3, 1000, 7),
    "one": (2, 77, 1),
    "all": (3, 129, 129),
    "rows of one value": (4, 1, 1),
    "more than a buffer holds": (2, 5003, 40),
    "most of many": (1, 4100, 3000),
    "no rows": (0, 9, 2),
}
KINDS = ("normal", "negative", "ascending", "descending", "ties", "equal", "any bits")


def problem(name: str, kind: str = "normal") -> tuple[Tensor, int]:
    """Return values and a count; float32."""
    rows, width, count = SHAPES[name]
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(rows, width, generator=generator)
    if kind == "negative":
        values = -values.abs() - 1
    elif kind in ("ascending", "descending"):
        values = values.sort(dim=1, descending=kind == "descending").values
    elif kind == "ties":
        values = torch.randint(-2, 3, (rows, width), generator=generator).float() * 0.1
        values[values == 0] *= -1  # zeros of both signs
    elif kind == "equal":
        values = torch.full((rows, width), -0.7)
    elif kind == "any bits":  # numbers of every magnitude, denormal ones too; no NaN, no infinity, and no sum overflows
        values = torch.randint(-(2**31), 2**31, (rows, width), generator=generator).int().view(torch.float32)
        values = torch.where(values.abs() < 1e30, values, values.new_zeros(()))
    return values, count


def exact(values: Tensor, count: int) -> Tensor:
    """Return the result from a whole sort, in float64."""
    return values.double().sort(dim=1, descending=True).values[:, :count].mean(1)


def run(values: Tensor, count: int, chosen: str, device: str = "cpu") -> Tensor:
    """Return the result of a backend, on the CPU."""
    with backend(chosen):
        return top_mean(values.to(device), count).cpu()


def check(name: str, kind: str, chosen: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
    """Assert that a backend is as exact as its type allows."""
    values, count = problem(name, kind)
    values = values.to(dtype)
    result = run(values, count, chosen, device)
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # Sums round in proportion to what is added up.
    scale = exact(values.abs(), values.shape[1] if kind == "normal" else count).clamp_min(1e-30)
    error = (result.double() - exact(values, count)).abs() / scale
    assert error.max() <= (1e-14 if dtype == torch.float64 else 1e-6) if len(error) else result.shape == (0,)


def check_not_finite(chosen: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
    """Assert what NaN and infinities do: in their own row, wherever they are."""
    for width in (50, 3000):
        values = torch.randn(8, width, generator=torch.Generator().manual_seed(0)).to(dtype)
        expected = exact(values, 3)
        values[1, -1] = values[3, 0] = math.nan
        values[2, width // 2] = -math.nan  # its sign bit is set: of ordered bits the smallest
        values[4, 7] = math.inf
        values[5, 7] = -math.inf
        values[6, 2:] = -math.inf
        values[7, : width - 1] = math.inf
        result = run(values, 3, chosen, device)
        assert result[1:4].isnan().all()
        assert result[4] == math.inf
        assert result[6] == -math.inf
        assert result[7] == math.inf
        torch.testing.assert_close(result[[0, 5]].double(), expected[[0, 5]], rtol=1e-6, atol=1e-6)


def check_repeats(chosen: str, device: str = "cpu") -> None:
    """Assert that a call gives the same bits each time, and each row those that it gives alone."""
    values, count = problem("some")
    result = run(values, count, chosen, device)
    for _ in range(3):
        assert torch.equal(run(values, count, chosen, device), result)
    alone = torch.cat([run(row.unsqueeze(0), count, chosen, device) for row in values])
    assert torch.equal(alone, result)
