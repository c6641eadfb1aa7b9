"""The nearest rows of a bank: the CUDA kernel, run on the CPU."""

import nearest_cases
import pytest
import torch


@pytest.mark.parametrize("name", nearest_cases.SHAPES)
def test_finds_the_nearest_in_order(name, order):
    nearest_cases.check(name, "native")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_compared_in_float32(dtype, order):
    nearest_cases.check("some", "native", dtype=dtype)


def test_parts_of_the_queries_give_the_same(order, monkeypatch):
    nearest_cases.check_parts("native", monkeypatch)


def test_not_a_number_is_never_nearest(order):
    nearest_cases.check_not_finite("native")
