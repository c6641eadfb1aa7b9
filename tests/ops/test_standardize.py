"""Averaged and standardised features, on every backend of the CPU."""

import pytest
import standardize_cases
import torch

from bkd_fast.ops.standardize import standardize
from bkd_fast.ops.standardize.reference import standardize as specified


@pytest.mark.parametrize("name", standardize_cases.SHAPES)
@pytest.mark.parametrize("layout", standardize_cases.LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_agrees_with_the_reference(name, layout, dtype, each_backend):
    standardize_cases.check(name, layout, each_backend, dtype)


@pytest.mark.parametrize("name", standardize_cases.SHAPES)
@pytest.mark.parametrize("layout", standardize_cases.LAYOUTS)
@pytest.mark.parametrize("border", [0.0, 0.4, 1.0])
def test_the_cpu_kernel_gives_the_bits_of_the_reference(name, layout, border):
    a = standardize_cases.problem(name, layout, torch.float32, border)
    assert torch.equal(standardize_cases.run(a, "native"), specified(a))


def test_not_a_number_shows_where_it_is_read(each_backend):
    standardize_cases.check_not_a_number(each_backend)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(3, 4, 4)}, ValueError, r"x has shape \(3, 4, 4\), expected \(N, C, H, W\)"),
        ({"x": torch.ones(1, 3, 0, 4)}, ValueError, "expected no size 0 but the batch"),
        ({"mean": torch.ones(2)}, ValueError, r"mean has shape \(2,\), expected \(3\)"),
        ({"std": torch.ones(1, 3, 1, 1)}, ValueError, r"std has shape \(1, 3, 1, 1\), expected \(3\)"),
        ({"patch_size": 2}, ValueError, "patch_size is 2, expected an odd integer from 1 to 255"),
        ({"patch_size": 257}, ValueError, "patch_size is 257, expected an odd integer"),
        ({"patch_size": 3.0}, ValueError, "patch_size is 3.0, expected an odd integer"),
        ({"border": 1.5}, ValueError, "border is 1.5, expected a number from 0 to 1"),
        ({"std": [1.0]}, TypeError, "std is of type list, expected a tensor"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, error, message):
    arguments = {"x": torch.ones(1, 3, 4, 4), "mean": torch.zeros(3), "std": torch.ones(3), "patch_size": 3}
    with pytest.raises(error, match=message):
        standardize(**{**arguments, **change})
