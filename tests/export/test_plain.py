"""What exported graphs are made of agrees with the specification."""

import pytest
import torch

from bkd_fast.export.plain import match_by_products
from bkd_fast.ops.local_match.reference import match


@pytest.mark.parametrize(
    ("height", "width", "radius"), [(9, 11, 2), (8, 16, 1), (3, 33, 3), (1, 1, 1), (2, 3, 0), (3, 5, 8), (12, 40, 8)]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_a_search_by_products_finds_the_same(height, width, radius, dtype):
    """Blocks of columns that fit and that do not, windows larger than the image, and the support's own dtype."""
    torch.manual_seed(0)
    query = torch.randn(2, 7, height, width, dtype=torch.float64)
    support = torch.randn(5, 7, height, width).to(dtype)
    shots = torch.tensor([[4, 0, 2], [1, 1, 3]])
    distance, displacement = match_by_products(query, support, shots, radius)
    expected, move = match(query, support, shots, radius)
    torch.testing.assert_close(distance, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(displacement, move)


def test_equal_distances_are_broken_alike():
    """Whole numbers have exact products: of nine equal pixels the nearest, then the first, is taken."""
    query, support = torch.ones(1, 4, 6, 10), torch.ones(2, 4, 6, 10)
    support[1, :, 2, 3] = 3  # where this is in front, another one is as near as those around it
    for one, other in zip(
        *(f(query, support, torch.tensor([[0, 1]]), 1) for f in (match_by_products, match)), strict=True
    ):
        assert torch.equal(one, other)


def test_nan_loses():
    query, support = torch.randn(1, 4, 6, 10), torch.randn(2, 4, 6, 10)
    support[1, 2, 3, 4] = torch.nan
    distance, displacement = match_by_products(query, support, torch.tensor([[0, 1]]), 1)
    expected, move = match(query, support, torch.tensor([[0, 1]]), 1)
    torch.testing.assert_close(distance, expected)
    assert torch.equal(displacement, move)
