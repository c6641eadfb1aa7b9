"""Problems for ``standardize``, and what holds on every backend."""

from __future__ import annotations

import torch
from torch import Tensor

from bkd_fast.ops import backend
from bkd_fast.ops.standardize import Arguments, standardize
from bkd_fast.ops.standardize.reference import standardize as specified

# (N, C, H, W), side of the square.
SHAPES = {
    "features": (2, 24, 7, 5, 3),
    "odd channels": (2, 7, 6, 5, 3),
    "an image": (2, 3, 9, 8, 1),
    "a wide square": (1, 12, 5, 4, 7),
    "a square beyond the image": (1, 4, 2, 3, 9),
    "one pixel": (3, 20, 1, 1, 3),
    "more than a block": (1, 40, 19, 33, 3),
    "no images": (0, 8, 4, 4, 3),
}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def problem(name: str, layout: str, dtype: torch.dtype, border: float = 1.0) -> Arguments:
    """Return the operator's arguments."""
    *shape, side = SHAPES[name]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=LAYOUTS[layout])
    mean, std = torch.randn(shape[1], generator=generator), torch.rand(shape[1], generator=generator) + 0.5
    return Arguments(x, mean.to(dtype), std.to(dtype), side, border)


def run(a: Arguments, chosen: str, device: str = "cpu") -> Tensor:
    """Return the result of a backend, on the CPU."""
    with backend(chosen):
        return standardize(a.x.to(device), a.mean.to(device), a.std.to(device), a.patch_size, a.border).cpu()


def check(name: str, layout: str, chosen: str, dtype: torch.dtype, device: str = "cpu") -> None:
    """Assert that a backend computes what the reference does, at every kind of border."""
    for border in (0.0, 0.4, 1.0):
        a = problem(name, layout, dtype, border)
        result = run(a, chosen, device)
        assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert not result.numel() or result.is_contiguous(memory_format=torch.channels_last)
        expected = specified(Arguments(*(v.double() if isinstance(v, Tensor) else v for v in a)))
        tolerance = 1e-12 if dtype == torch.float64 else 3e-6
        torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance)


def check_not_a_number(chosen: str, device: str = "cpu") -> None:
    """Assert that NaN shows where its square reaches, and nowhere else."""
    a = problem("features", "channels_last", torch.float32)
    a.x[1, 5, 0, 2] = torch.nan
    found = run(a, chosen, device).isnan().nonzero()
    assert found.tolist() == [[1, 5, y, x] for y in (0, 1) for x in (1, 2, 3)]
