"""Bias, shortcut and activation: the Triton kernel, interpreted."""

import activation_cases
import pytest
import torch


@pytest.mark.parametrize("shape", activation_cases.SHAPES)
@pytest.mark.parametrize("layout", activation_cases.LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_equals_the_reference(shape, layout, dtype):
    activation_cases.check(shape, layout, "triton", dtype)


def test_not_a_number_stays():
    activation_cases.check_not_a_number("triton")


def test_views_give_what_copies_give():
    activation_cases.check_views("triton")
