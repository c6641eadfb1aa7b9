"""What retrieves and matches supports: the CUDA kernels, run on the CPU."""

import pytest
import retrieval_cases
import torch

TYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("name", retrieval_cases.GRIDS)
def test_means_of_cells_agree_with_the_reference(name, last, order):
    retrieval_cases.check_grid(name, "native", last=last)


def test_means_of_half_precision_are_float32():
    retrieval_cases.check_grid("cells that overlap", "native", torch.float16)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("name", retrieval_cases.MATCHES)
@pytest.mark.parametrize("dtype", TYPES)
def test_supports_agree_with_the_reference(name, dtype, whole, order):
    retrieval_cases.check_match(name, "native", dtype, whole)


def test_shots_that_do_not_exist_are_not_read(order):
    retrieval_cases.check_missing_shots("native")


@pytest.mark.parametrize("name", retrieval_cases.RESIDUALS)
@pytest.mark.parametrize("dtype", TYPES)
def test_residuals_agree_with_the_reference(name, dtype, order):
    retrieval_cases.check_residual(name, "native", dtype)


def test_a_row_of_the_bank_has_no_residual(order):
    retrieval_cases.check_row_of_the_bank("native")


def test_neighbors_that_do_not_exist_are_not_read(order):
    retrieval_cases.check_missing_neighbors("native")


@pytest.mark.parametrize("name", ["two views", "many pixels"])
def test_the_order_of_threads_does_not_matter(name):
    a = retrieval_cases.matches(name, torch.float16)
    query, bank, neighbors, values = retrieval_cases.residuals("as the model has them")
    from bkd_fast.ops import backend
    from bkd_fast.ops.neighbor_residual import neighbor_residual

    runs = []
    for order in ("forward", "reversed", "random"):
        torch.ops.cuda_on_cpu.order(order, 1)
        with backend("native"):
            runs.append([*retrieval_cases.matched(a, "native"), *neighbor_residual(query, bank, neighbors, values)])
    for run in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(runs[0], run, strict=True))
