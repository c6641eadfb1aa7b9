"""Levels side by side: the Triton kernel, interpreted."""

import join_cases
import pytest
import torch


@pytest.mark.parametrize("name", join_cases.SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_agrees_with_the_reference(name, dtype):
    join_cases.check(name, "triton", dtype)
