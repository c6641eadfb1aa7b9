"""The pixels that match best, on every backend of the CPU."""

import neighbor_cases
import pytest
import torch

from bkd_fast.ops import local_match
from bkd_fast.ops.select_matches import select_matches


@pytest.mark.parametrize("name", neighbor_cases.MATCHES)
def test_selects_the_nearest(name, each_backend):
    neighbor_cases.check_matches(name, each_backend)


def test_positions_are_rows_of_the_support(each_backend):
    """The distance of each pixel to the feature at its first position is the smallest of all."""
    generator = torch.Generator().manual_seed(0)
    query, support = torch.randn(2, 6, 5, 7, generator=generator), torch.randn(4, 6, 5, 7, generator=generator)
    shots = torch.tensor([[0, 2, 3], [1, 0, 2]])
    distance, displacement = local_match(query, support, shots, 2)
    positions = select_matches(distance, displacement, shots, 3)
    rows = support.permute(0, 2, 3, 1).flatten(0, 2)
    distances = (rows[positions] - query.permute(0, 2, 3, 1).unsqueeze(3)).square().mean(4)
    torch.testing.assert_close(distances, distance.sort(1).values.permute(0, 2, 3, 1))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"distance": torch.ones(1, 2, 3)}, ValueError, r"distance has shape \(1, 2, 3\), expected \(N, k, H, W\)"),
        ({"displacement": torch.ones(1, 2, 1, 3, 4)}, ValueError, r"expected \(1, 2, 2, 3, 4\)"),
        ({"shots": torch.zeros(1, 2)}, TypeError, "shots is torch.float32, expected int64"),
        ({"shots": torch.zeros(1, 3).long()}, ValueError, r"shots has shape \(1, 3\), expected \(1, 2\)"),
        ({"matches": 0}, ValueError, "matches is 0, expected an integer from 1 to 2"),
        ({"matches": 3}, ValueError, "matches is 3, expected an integer from 1 to 2"),
        ({"matches": True}, ValueError, "matches is True"),
        ({"distance": 1}, TypeError, "distance is of type int, expected a tensor"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, error, message):
    arguments = {
        "distance": torch.ones(1, 2, 3, 4),
        "displacement": torch.zeros(1, 2, 2, 3, 4),
        "shots": torch.zeros(1, 2).long(),
        "matches": 1,
    }
    with pytest.raises(error, match=message):
        select_matches(**{**arguments, **change})
