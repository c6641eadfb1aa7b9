"""Rows as combinations of their neighbours, on every backend of the CPU."""

import neighbor_cases
import pytest
import torch

from bkd_fast.ops.neighbor_regression import neighbor_regression
from bkd_fast.ops.neighbor_regression.reference import regression_weights


@pytest.mark.parametrize("name", neighbor_cases.REGRESSIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_is_as_exact_as_float32(name, dtype, each_backend):
    neighbor_cases.check_regression(name, each_backend, dtype)


@pytest.mark.parametrize("name", neighbor_cases.REGRESSIONS)
@pytest.mark.parametrize("ridge", [0.01, 0.7, 10.0])
def test_float64_equals_the_definition(name, ridge):
    """(G / g + ridge I)^-1 1, solved by LAPACK."""
    query, bank, neighbors = (tensor.double() if tensor.is_floating_point() else tensor for tensor in
                              neighbor_cases.regression(name))  # fmt: skip
    weights = neighbor_cases.exact_weights(query, bank[neighbors], ridge)
    expected = (weights.unsqueeze(2) * bank[neighbors]).sum(1)
    result = neighbor_regression(query, bank, neighbors, ridge)
    assert result.dtype == torch.float64
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-7)
    for size in (1e-4, 1e4):  # the size of features does not matter
        scaled = neighbor_regression(size * query, size * bank, neighbors, ridge) / size
        torch.testing.assert_close(scaled, result, rtol=1e-5, atol=1e-6)


def test_with_a_small_ridge_a_neighbour_equal_to_the_query_is_returned():
    bank = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    result = neighbor_regression(bank[[3]], bank, torch.tensor([[1, 3, 0]]), 1e-6)
    torch.testing.assert_close(result, bank[[3]], rtol=0, atol=1e-3)


def test_equal_neighbours_are_averaged():
    bank = torch.ones(4, 6)
    result = neighbor_regression(torch.ones(1, 6), bank, torch.tensor([[0, 1, 2]]))
    torch.testing.assert_close(result, torch.ones(1, 6))


def test_not_a_number_stays_in_its_row(each_backend):
    neighbor_cases.check_not_a_number(each_backend)


def test_any_strides_are_accepted():
    query, bank, neighbors = neighbor_cases.regression("few neighbours")
    strided = [
        tensor.repeat_interleave(2, 1)[:, ::2].t().contiguous().t() for tensor in (query, bank, neighbors)
    ]  # fmt: skip
    torch.testing.assert_close(neighbor_regression(*strided), neighbor_regression(query, bank, neighbors))


def test_the_reference_has_a_gradient():
    few = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    own = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(regression_weights, (own, few))


@pytest.mark.parametrize("wrong", [-1, 40, 2**40])
def test_a_neighbour_that_is_no_row_is_an_error(wrong):
    query, bank, neighbors = neighbor_cases.regression("few neighbours")
    neighbors[7, 2] = wrong
    with pytest.raises(IndexError, match=f"neighbors has {wrong}, expected 0 to 39"):
        neighbor_regression(query, bank, neighbors)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": torch.ones(2, 3, 4)}, ValueError, r"query has shape \(2, 3, 4\), expected \(R, C\)"),
        ({"bank": torch.ones(4, 5)}, ValueError, r"bank has shape \(4, 5\), expected \(M, 3\)"),
        ({"bank": torch.ones(4, 3, dtype=torch.float64)}, TypeError, "float64 cannot be mixed"),
        ({"neighbors": torch.zeros(2, 2, dtype=torch.int32)}, TypeError, "neighbors is torch.int32, expected int64"),
        ({"neighbors": torch.zeros(3, 2, dtype=torch.int64)}, ValueError, r"expected \(2, K\)"),
        ({"neighbors": torch.zeros(2, 0, dtype=torch.int64)}, ValueError, "expected 1 to 64 neighbors a row"),
        ({"neighbors": torch.zeros(2, 65, dtype=torch.int64)}, ValueError, "expected 1 to 64 neighbors a row"),
        ({"ridge": 0.0}, ValueError, "ridge is 0.0, expected a number from 1e-6 to 1e6"),
        ({"ridge": float("nan")}, ValueError, "ridge is nan"),
        ({"query": None}, TypeError, "query is of type NoneType, expected a tensor"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, error, message):
    arguments = {"query": torch.ones(2, 3), "bank": torch.ones(4, 3), "neighbors": torch.zeros(2, 2).long()}
    with pytest.raises(error, match=message):
        neighbor_regression(**{**arguments, **change})
