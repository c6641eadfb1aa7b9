"""``grid_means``, ``match_supports`` and ``neighbor_residual``, on every backend of the CPU."""

import pytest
import retrieval_cases
import torch
import torch.nn.functional as F

from bkd_fast.ops import backend, local_match
from bkd_fast.ops.grid_means import grid_means
from bkd_fast.ops.match_supports import match_supports
from bkd_fast.ops.neighbor_regression import neighbor_regression
from bkd_fast.ops.neighbor_residual import neighbor_residual
from bkd_fast.ops.select_matches import select_matches

TYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("name", retrieval_cases.GRIDS)
def test_means_of_cells(name, last, each_backend):
    for dtype in (*TYPES, torch.float64):
        retrieval_cases.check_grid(name, each_backend, dtype, last)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("name", retrieval_cases.MATCHES)
@pytest.mark.parametrize("dtype", TYPES)
def test_supports_are_what_the_definition_gives(name, dtype, whole, each_backend):
    retrieval_cases.check_match(name, each_backend, dtype, whole)


@pytest.mark.parametrize("name", retrieval_cases.MATCHES)
def test_supports_are_those_of_three_operators_bit_for_bit(name, each_backend):
    a = retrieval_cases.matches(name, torch.float16)
    results = retrieval_cases.matched(a, each_backend)
    with backend(each_backend):
        for query, support, result in zip(a.queries, a.supports, results, strict=True):
            distance, displacement = local_match(query, support, a.shots, a.radius)
            positions = select_matches(distance, displacement, a.shots, a.neighbors)
            rows = support.permute(0, 2, 3, 1).flatten(0, 2)
            own = query.permute(0, 2, 3, 1).flatten(0, 2)
            if a.neighbors > 1:
                expected = neighbor_regression(own, rows, positions.flatten(0, 2), a.ridge)
            else:
                expected = rows[positions.flatten()].float()
            assert torch.equal(result.permute(0, 2, 3, 1).flatten(0, 2), expected)


@pytest.mark.parametrize("name", retrieval_cases.RESIDUALS)
@pytest.mark.parametrize("dtype", TYPES)
def test_residuals_are_what_the_definition_gives(name, dtype, each_backend):
    retrieval_cases.check_residual(name, each_backend, dtype)


def test_residuals_are_those_of_the_regression_bit_for_bit(each_backend):
    query, bank, neighbors, values = retrieval_cases.residuals("as the model has them")
    with backend(each_backend):
        residual, means = neighbor_residual(query, bank, neighbors, values)
        combined = neighbor_regression(query, bank, neighbors)
    assert torch.equal(residual, F.mse_loss(combined, query, reduction="none").mean(1))
    assert torch.equal(means, values[neighbors].mean(1))


def test_a_row_of_the_bank_has_no_residual(each_backend):
    retrieval_cases.check_row_of_the_bank(each_backend)


def test_float64_stays():
    query, bank, neighbors, values = retrieval_cases.residuals("some")
    residual, means = neighbor_residual(query.double(), bank.double(), neighbors, values.double())
    assert residual.dtype == means.dtype == torch.float64
    a = retrieval_cases.matches("two views")
    results = match_supports([x.double() for x in a.queries], [x.double() for x in a.supports], a.shots, 1, 2)
    assert all(result.dtype == torch.float64 for result in results)


def test_what_does_not_exist_is_an_error():
    a = retrieval_cases.matches("two views")
    a.shots[1, 0] = 5
    with pytest.raises(IndexError, match="shots has 5, expected 0 to 4"):
        match_supports(*a)
    query, bank, neighbors, values = retrieval_cases.residuals("some")
    neighbors[1, 0] = -1
    with pytest.raises(IndexError, match="neighbors has -1, expected 0 to 39"):
        neighbor_residual(query, bank, neighbors, values)


ONE, TWO = torch.ones(1, 3, 2, 2), torch.ones(4, 3, 2, 2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"queries": []}, ValueError, "queries is empty, expected at least one view"),
        ({"queries": [ONE, ONE]}, ValueError, "supports has 1 tensors, expected 2, one for each view"),
        ({"queries": [1]}, TypeError, r"queries\[0\] is of type int, expected a tensor"),
        ({"queries": [ONE[0]]}, ValueError, r"queries\[0\] has shape \(3, 2, 2\), expected \(1, C, H, W\)|expected"),
        ({"queries": [ONE[:, :, :0]]}, ValueError, "expected no size 0 but the batch"),
        ({"supports": [TWO[:, :2]]}, ValueError, r"supports\[0\] has shape \(4, 2, 2, 2\), expected \(4, 3, 2, 2\)"),
        ({"supports": [TWO.double()]}, TypeError, "float64 cannot be mixed"),
        ({"queries": [ONE, ONE], "supports": [TWO, TWO.half()]}, TypeError, r"supports\[1\] is torch.float16"),
        ({"queries": [ONE, ONE.half()], "supports": [TWO, TWO]}, TypeError, r"queries\[1\] is torch.float16"),
        ({"shots": torch.zeros(1, 2)}, TypeError, "shots is torch.float32, expected int64"),
        ({"shots": torch.zeros(2, 2).long()}, ValueError, r"shots has shape \(2, 2\), expected \(1, k\)"),
        ({"shots": torch.zeros(1, 65).long()}, ValueError, "expected 1 to 64 shots a query"),
        ({"radius": 9}, ValueError, "radius is 9, expected an integer from 0 to 8"),
        ({"radius": True}, ValueError, "radius is True"),
        ({"neighbors": 3}, ValueError, "neighbors is 3, expected an integer from 1 to 2"),
        ({"neighbors": 0}, ValueError, "neighbors is 0, expected an integer from 1 to 2"),
        ({"ridge": 0.0}, ValueError, "ridge is 0.0"),
    ],
)
def test_supports_that_do_not_fit_are_named(change, error, message):
    arguments = {"queries": [ONE], "supports": [TWO], "shots": torch.zeros(1, 2).long(), "radius": 1, "neighbors": 2}
    with pytest.raises(error, match=message):
        match_supports(**{**arguments, **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"values": torch.ones(3, 2)}, ValueError, r"values has shape \(3, 2\), expected \(4, V\)"),
        ({"values": torch.ones(4, 2).long()}, TypeError, "values is torch.int64"),
        ({"values": None}, TypeError, "values is of type NoneType"),
        ({"bank": torch.ones(4, 5)}, ValueError, r"neighbor_residual: bank has shape \(4, 5\), expected \(M, 3\)"),
        ({"ridge": float("nan")}, ValueError, "neighbor_residual: ridge is nan"),
    ],
)
def test_residuals_of_what_does_not_fit_are_refused(change, error, message):
    arguments = {"query": torch.ones(2, 3), "bank": torch.ones(4, 3), "neighbors": torch.zeros(2, 2).long(),
                 "values": torch.ones(4, 2)}  # fmt: skip
    with pytest.raises(error, match=message):
        neighbor_residual(**{**arguments, **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(3, 2, 2)}, ValueError, r"x has shape \(3, 2, 2\), expected \(N, C, H, W\)"),
        ({"x": torch.ones(1, 3, 0, 2)}, ValueError, "expected no size 0 but the batch"),
        ({"x": 1}, TypeError, "x is of type int"),
        ({"grid": 0}, ValueError, "grid is 0, expected an integer from 1 to 1024"),
        ({"grid": 1025}, ValueError, "grid is 1025"),
        ({"grid": True}, ValueError, "grid is True"),
    ],
)
def test_means_of_what_does_not_fit_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        grid_means(**{"x": torch.ones(1, 3, 4, 4), "grid": 2, **change})


def test_supports_compile_and_export():
    class Read(torch.nn.Module):
        def forward(self, one, two, *supports):
            return [view * 2 for view in match_supports([one, two], list(supports), shots, 1, 3)]

    a = retrieval_cases.matches("two views")
    shots = a.shots
    program = torch.export.export(Read(), (*a.queries, *a.supports))
    for result, expected in zip(
        program.module()(*a.queries, *a.supports), match_supports(*a._replace(neighbors=3)), strict=True
    ):
        assert torch.equal(result, 2 * expected)
