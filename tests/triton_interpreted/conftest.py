"""The Triton kernels on the CPU: all of this needs TRITON_INTERPRET=1 before Triton is imported."""

import os
from pathlib import Path

import poisoning
import pytest
import selection
import torch

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_operators.py", "test_split_depth.py"]


def pytest_collection_modifyitems(items):
    selection.mark_the_rest_slow(items, Path(__file__).parent)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    poisoning.poison(monkeypatch)


@pytest.fixture(autouse=True)
def ieee():
    """The interpreter has no TF32."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = before
