"""The mean of the largest values: the Triton kernel, interpreted."""

import pytest
import top_mean_cases
import torch


@pytest.mark.parametrize("kind", top_mean_cases.KINDS)
@pytest.mark.parametrize("name", top_mean_cases.SHAPES)
def test_is_the_mean_of_the_largest(name, kind):
    top_mean_cases.check(name, kind, "triton")


def test_half_precision_is_computed_in_float32():
    top_mean_cases.check("some", "normal", "triton", dtype=torch.float16)


def test_not_a_number_and_infinities_stay_in_their_row():
    top_mean_cases.check_not_finite("triton")


def test_a_call_repeats_bit_for_bit():
    top_mean_cases.check_repeats("triton")
