"""Cases of ``grid_means``, ``match_supports`` and ``neighbor_residual``, and checks that every backend must pass."""

from __future__ import annotations

import torch
from torch import Tensor

from bkd_fast.ops import backend
from bkd_fast.ops.grid_means import grid_means
from bkd_fast.ops.match_supports import Arguments, match_supports
from bkd_fast.ops.match_supports import reference as matching
from bkd_fast.ops.neighbor_regression.reference import combined
from bkd_fast.ops.neighbor_residual import neighbor_residual

# Images, channels, height, width, cells along a side.
GRIDS = {
    "whole cells": (2, 19, 16, 12, 4),
    "cells that overlap": (2, 5, 7, 9, 4),
    "more cells than pixels": (1, 3, 2, 3, 4),
    "one cell": (3, 40, 5, 5, 1),
    "many channels": (1, 300, 4, 4, 2),
    "no images": (0, 3, 4, 4, 2),
}
# Queries, images, shots, radius, neighbors, and of each view channels, height and width.
MATCHES = {
    "two views": (2, 5, 4, 1, 3, ((19, 6, 5), (40, 3, 4))),
    "as the model has them": (1, 20, 16, 1, 5, ((64, 6, 6), (136, 3, 3))),
    "one neighbor": (2, 5, 4, 1, 1, ((24, 4, 5),)),
    "all shots": (1, 4, 3, 2, 3, ((8, 5, 7),)),
    "as many neighbors as a warp solves": (1, 9, 8, 0, 6, ((16, 3, 3),)),
    "more neighbors than a warp solves": (1, 9, 8, 1, 7, ((16, 3, 3), (5, 2, 2))),
    "many shots": (1, 9, 64, 0, 5, ((8, 3, 2),)),
    "one shot": (2, 3, 1, 1, 1, ((8, 3, 2), (8, 2, 2))),
    "many pixels": (3, 4, 2, 0, 2, ((8, 31, 33), (8, 5, 3))),
    "many views": (1, 3, 2, 0, 2, ((8, 3, 2),) * 9),
    "no queries": (0, 3, 2, 1, 2, ((8, 3, 2),)),
}
# Rows, channels, rows of the bank, neighbours, values.
RESIDUALS = {
    "some": (5, 24, 40, 5, 2),
    "as the model has them": (2, 700, 30, 16, 2),
    "odd channels": (3, 37, 20, 16, 1),
    "one neighbour": (4, 16, 7, 1, 3),
    "a tile of products": (3, 64, 9, 4, 0),
    "more tiles than warps": (2, 33, 70, 30, 2),
    "most neighbours": (2, 20, 80, 64, 700),
    "no rows": (0, 8, 3, 2, 2),
}


def image(name: str, dtype: torch.dtype = torch.float32, last: bool = True) -> tuple[Tensor, int]:
    """Return images and a grid."""
    *shape, grid = GRIDS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    return x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format), grid


def check_grid(
    name: str, chosen: str, dtype: torch.dtype = torch.float32, last: bool = True, device: str = "cpu"
) -> None:
    """Assert that a backend is as exact as its type allows."""
    x, grid = image(name, dtype, last)
    with backend(chosen):
        result = grid_means(x.to(device), grid).cpu()
    assert result.is_contiguous()
    exact = torch.nn.functional.adaptive_avg_pool2d(x.double(), grid).flatten(1)
    torch.testing.assert_close(result, exact.to(result.dtype), rtol=1e-5, atol=1e-6)


def matches(name: str, dtype: torch.dtype = torch.float32, whole: bool = False, last: bool = True) -> Arguments:
    """Return a call's arguments, the supports in a dtype.

    ``whole``: few and whole numbers, so that many distances are equal and no sum is rounded; some are NaN.
    """
    queries, images, shots, radius, neighbors, shapes = MATCHES[name]
    generator = torch.Generator().manual_seed(0)
    layout = torch.channels_last if last else torch.contiguous_format

    def views(count: int) -> list[Tensor]:
        made = [torch.randn(count, *shape, generator=generator) for shape in shapes]
        for view in made if whole else ():
            view.round_()
            view[torch.rand(view.shape, generator=generator) > 0.995] = torch.nan
        return [view.contiguous(memory_format=layout) for view in made]

    own, supports = views(queries), [view.to(dtype) for view in views(images)]
    return Arguments(
        own, supports, torch.randint(images, (queries, shots), generator=generator), radius, neighbors, 0.3
    )


def matched(a: Arguments, chosen: str, device: str = "cpu") -> list[Tensor]:
    """Return the results of a backend, on the CPU."""
    queries, supports = ([view.to(device) for view in views] for views in (a.queries, a.supports))
    with backend(chosen):
        results = match_supports(queries, supports, a.shots.to(device), a.radius, a.neighbors, a.ridge)
    assert all(result.is_contiguous(memory_format=torch.channels_last) for result in results)
    return [result.cpu() for result in results]


def check_match(name: str, chosen: str, dtype: torch.dtype, whole: bool, device: str = "cpu") -> None:
    """Assert that a backend selects what the reference does, ties and NaN included, and combines it as exactly."""
    a = matches(name, dtype, whole)
    plain = a._replace(supports=[view.float() for view in a.supports])
    wide = plain._replace(
        queries=[view.double() for view in a.queries], supports=[view.double() for view in a.supports]
    )
    exact = matching.match_supports(plain if whole else wide)  # whole numbers are exact in both, and so are ties
    for result, expected in zip(matched(a, chosen, device), exact, strict=True):
        assert result.dtype == torch.float32
        if a.neighbors == 1:
            assert torch.equal(result.nan_to_num(9e9), expected.float().nan_to_num(9e9))
        torch.testing.assert_close(result, expected.float(), rtol=1e-4, atol=2e-4, equal_nan=True)


def check_missing_shots(chosen: str, device: str = "cpu") -> None:
    """Assert that an image that does not exist is never read: it loses to others, and makes NaN where none is left."""
    for name in ("all shots", "one neighbor", "more neighbors than a warp solves"):
        a = matches(name)
        complete = a._replace(shots=a.shots.clone())
        shots = a.shots.repeat(1, 2)[:, : a.shots.shape[1] + 1].clone()
        shots[:, -1] = -1
        a = a._replace(shots=shots)
        # One shot that is not there loses to the others.
        for result, expected in zip(matched(a, chosen, device), matched(complete, chosen, device), strict=True):
            torch.testing.assert_close(result, expected, rtol=0, atol=0)
        a.shots[:, -a.neighbors :] = 2**40
        for result in matched(a._replace(shots=a.shots[:, -a.neighbors :].contiguous()), chosen, device):
            assert result.isnan().all()
        nothing = a._replace(supports=[view[:0] for view in a.supports])
        assert all(result.isnan().all() for result in matched(nothing, chosen, device))


def residuals(name: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return query, bank in a dtype, neighbours and values."""
    rows, channels, images, count, width = RESIDUALS[name]
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(rows, channels, generator=generator)
    bank = torch.randn(images, channels, generator=generator).to(dtype)
    neighbors = torch.randint(images, (rows, count), generator=generator)
    return query, bank, neighbors, torch.randn(images, width, generator=generator)


def check_residual(name: str, chosen: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
    """Assert that a backend is as exact as float32 allows, whatever the bank's dtype."""
    query, bank, neighbors, values = residuals(name, dtype)
    with backend(chosen):
        result, means = neighbor_residual(*(each.to(device) for each in (query, bank, neighbors, values)))
    assert result.dtype == means.dtype == torch.float32
    exact = (combined(query.double(), bank.double(), neighbors, 0.3) - query.double()).square().mean(1)
    torch.testing.assert_close(result.cpu().double(), exact, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(means.cpu(), values[neighbors].mean(1), rtol=1e-5, atol=1e-6)


def check_row_of_the_bank(chosen: str, device: str = "cpu") -> None:
    """Assert that a row is at no distance from itself, and that NaN stays in its row."""
    query, bank, _, values = residuals("some")
    neighbors = torch.arange(len(query)).unsqueeze(1)
    query = bank[: len(query)].clone()
    query[2, 5] = torch.nan
    with backend(chosen):
        result, means = neighbor_residual(*(each.to(device) for each in (query, bank, neighbors, values)))
    assert result[2].isnan()
    assert not result[[0, 1, 3, 4]].any()
    assert torch.equal(means.cpu(), values[: len(query)])


def check_missing_neighbors(chosen: str, device: str = "cpu") -> None:
    """Assert that a row that is not in the bank is not read: both results are NaN, and others are not touched."""
    for name in ("some", "more tiles than warps"):
        query, bank, neighbors, values = (each.to(device) for each in residuals(name))
        with backend(chosen):
            expected = neighbor_residual(query, bank, neighbors, values)
            neighbors[1, -1] = len(bank)
            results = neighbor_residual(query, bank, neighbors, values)
            neighbors[1, 0] = -1
            again = neighbor_residual(query, bank, neighbors, values)
            none = neighbor_residual(query, bank[:0], neighbors, values[:0])
        for result, other, empty, whole in zip(results, again, none, expected, strict=True):
            assert result[1].isnan().all()
            assert other[1].isnan().all()
            assert empty.isnan().all()
            assert torch.equal(result[0], whole[0])
