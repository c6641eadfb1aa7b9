"""Neighbour regression and the selection of matches: the CUDA kernels, run on the CPU."""

import neighbor_cases
import pytest
import torch


@pytest.mark.parametrize("name", neighbor_cases.REGRESSIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_regression_agrees_with_the_reference(name, dtype, order):
    neighbor_cases.check_regression(name, "native", dtype)


@pytest.mark.parametrize("name", neighbor_cases.MATCHES)
def test_selection_agrees_with_the_reference(name, order):
    neighbor_cases.check_matches(name, "native")


def test_rows_that_do_not_exist_are_not_read(order):
    neighbor_cases.check_missing_rows("native")


def test_not_a_number_stays_in_its_row(order):
    neighbor_cases.check_not_a_number("native")
