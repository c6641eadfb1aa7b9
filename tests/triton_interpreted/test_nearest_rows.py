"""The nearest rows of a bank: the Triton kernel, interpreted."""

import nearest_cases
import pytest
import torch


@pytest.mark.parametrize("name", nearest_cases.SHAPES)
def test_finds_the_nearest_in_order(name):
    nearest_cases.check(name, "triton")


def test_half_precision_is_compared_in_float32():
    nearest_cases.check("some", "triton", dtype=torch.float16)


def test_parts_of_the_queries_give_the_same(monkeypatch):
    nearest_cases.check_parts("triton", monkeypatch)


def test_not_a_number_is_never_nearest():
    nearest_cases.check_not_finite("triton")
