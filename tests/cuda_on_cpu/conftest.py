"""Every test here runs the CUDA kernels on the CPU, through the same Python and bindings as on a GPU."""

from __future__ import annotations

import os
from pathlib import Path

import building
import pytest
import torch

ORDERS = ("forward", "reversed", "random")


@pytest.fixture(scope="session")
def library() -> str:
    """Compiled and loaded; or CUDA_ON_CPU, a library that somebody else built: sanitized, or with a fault."""
    if reason := building.why_not():
        pytest.skip(reason)
    architecture = int(os.environ.get("CUDA_ON_CPU_ARCHITECTURE", "800"))
    given = os.environ.get("CUDA_ON_CPU")
    path = (
        Path(given)
        if given
        else building.build(building.ROOT / "build" / f"cuda_on_cpu_{architecture}", architecture=architecture)
    )
    torch.ops.load_library(str(path))
    return str(path)


@pytest.fixture(autouse=True)
def on_cpu(library, monkeypatch):
    """CUDA's kernels are the native backend of CPU tensors."""
    from bkd_fast.ops import cuda_common, native

    monkeypatch.setitem(native.DEVICES, "cpu", native.CUDA)
    monkeypatch.setattr(cuda_common, "NAMESPACE", "bkd_fast_cuda_on_cpu")
    torch.ops.cuda_on_cpu.order("forward", 0)


@pytest.fixture(params=ORDERS)
def order(request, on_cpu) -> str:
    """In which order the threads of a block take turns: a missing barrier shows in one of them."""
    torch.ops.cuda_on_cpu.order(request.param, 1)
    return request.param
