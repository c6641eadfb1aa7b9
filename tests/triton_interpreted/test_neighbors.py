"""Neighbour regression and the selection of matches: the Triton kernels, interpreted."""

import neighbor_cases
import pytest
import torch

from bkd_fast.ops import backend
from bkd_fast.ops.neighbor_regression import neighbor_regression
from bkd_fast.ops.neighbor_regression.reference import combined


@pytest.mark.parametrize("name", neighbor_cases.REGRESSIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_regression_agrees_with_the_reference(name, dtype):
    neighbor_cases.check_regression(name, "triton", dtype)


def test_more_neighbours_than_the_kernel_takes_are_combined_too():
    query, bank, _ = neighbor_cases.regression("many neighbours")
    neighbors = torch.arange(20).expand(len(query), -1)
    with backend("triton"):
        result = neighbor_regression(query, bank, neighbors)
    torch.testing.assert_close(result, combined(query, bank, neighbors, 0.3))


@pytest.mark.parametrize("name", neighbor_cases.MATCHES)
def test_selection_agrees_with_the_reference(name):
    neighbor_cases.check_matches(name, "triton")


def test_rows_that_do_not_exist_are_not_read():
    neighbor_cases.check_missing_rows("triton")


def test_not_a_number_stays_in_its_row():
    neighbor_cases.check_not_a_number("triton")
