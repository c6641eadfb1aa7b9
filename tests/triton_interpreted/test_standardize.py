"""Averaged and standardised features: the Triton kernel, interpreted."""

import pytest
import standardize_cases
import torch


@pytest.mark.parametrize("name", standardize_cases.SHAPES)
@pytest.mark.parametrize("layout", standardize_cases.LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_agrees_with_the_reference(name, layout, dtype):
    standardize_cases.check(name, layout, "triton", dtype)


def test_not_a_number_shows_where_it_is_read():
    standardize_cases.check_not_a_number("triton")
