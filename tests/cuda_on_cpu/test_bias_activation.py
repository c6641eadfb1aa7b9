"""Bias, shortcut and activation: the CUDA kernel, run on the CPU."""

import activation_cases
import pytest
import torch


@pytest.mark.parametrize("shape", activation_cases.SHAPES)
@pytest.mark.parametrize("layout", activation_cases.LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equals_the_reference(shape, layout, dtype, order):
    activation_cases.check(shape, layout, "native", dtype)


def test_not_a_number_stays(order):
    activation_cases.check_not_a_number("native")


def test_views_give_what_copies_give(order):
    activation_cases.check_views("native")
