"""Levels side by side, on every backend of the CPU. tests/model/test_joint.py has what they mean."""

import join_cases
import pytest
import torch

from bkd_fast.ops.join_levels import join_levels


@pytest.mark.parametrize("name", join_cases.SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_agrees_with_the_reference(name, dtype, each_backend):
    join_cases.check(name, each_backend, dtype)


def test_pixels_are_averages_and_neighbours():
    fine = torch.arange(16.0).view(1, 1, 4, 4)
    coarse = torch.tensor([[[[2.0]]]])
    result = join_levels([fine, coarse], [1.0, 10.0], 2)
    assert result[0, 0].tolist() == [[2.5, 4.5], [10.5, 12.5]]
    assert result[0, 1].tolist() == [[20.0, 20.0], [20.0, 20.0]]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"levels": []}, ValueError, "levels"),
        ({"levels": [torch.ones(1, 3, 4)]}, ValueError, r"levels\[0\] has shape \(1, 3, 4\), expected \(1, C, H, W\)"),
        ({"levels": [torch.ones(1, 3, 4, 0)]}, ValueError, "expected no size 0 but the batch"),
        ({"levels": [torch.ones(1, 3, 4, 4), torch.ones(2, 3, 4, 4)], "factors": [1.0] * 2}, ValueError, "expected"),
        ({"factors": [1.0, 2.0]}, ValueError, "factors has 2 numbers, expected 1, one for each level"),
        ({"size": (0, 2)}, ValueError, r"size is \(0, 2\), expected"),
        ({"levels": [1.0]}, TypeError, r"levels\[0\] is of type float, expected a tensor"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, error, message):
    arguments = {"levels": [torch.ones(1, 3, 4, 4)], "factors": [1.0], "size": (2, 2)}
    with pytest.raises(error, match=message):
        join_levels(**{**arguments, **change})
