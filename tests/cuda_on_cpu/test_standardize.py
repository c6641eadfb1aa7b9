"""Averaged and standardised features: the CUDA kernel, run on the CPU."""

import pytest
import standardize_cases
import torch


@pytest.mark.parametrize("name", standardize_cases.SHAPES)
@pytest.mark.parametrize("layout", standardize_cases.LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_agrees_with_the_reference(name, layout, dtype, order):
    standardize_cases.check(name, layout, "native", dtype)


def test_not_a_number_shows_where_it_is_read(order):
    standardize_cases.check_not_a_number("native")
