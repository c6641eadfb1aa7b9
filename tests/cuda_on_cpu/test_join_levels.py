"""Levels side by side: the CUDA kernel, run on the CPU."""

import join_cases
import pytest
import torch


@pytest.mark.parametrize("name", join_cases.SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_agrees_with_the_reference(name, dtype, order):
    join_cases.check(name, "native", dtype)
