"""What retrieves and matches supports: the Triton kernels, interpreted."""

import pytest
import retrieval_cases
import torch


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("name", retrieval_cases.GRIDS)
def test_means_of_cells_agree_with_the_reference(name, last):
    retrieval_cases.check_grid(name, "triton", last=last)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("name", [name for name in retrieval_cases.MATCHES if name != "many pixels"])
def test_supports_agree_with_the_reference(name, whole):
    retrieval_cases.check_match(name, "triton", torch.float16, whole)


@pytest.mark.parametrize("name", retrieval_cases.RESIDUALS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_residuals_agree_with_the_reference(name, dtype):
    retrieval_cases.check_residual(name, "triton", dtype)


def test_a_row_of_the_bank_has_no_residual():
    retrieval_cases.check_row_of_the_bank("triton")
