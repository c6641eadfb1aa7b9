"""Fixtures of the operator tests: every device and backend there is, and poisoned memory."""

from __future__ import annotations

import sys

import pytest
import torch

from bkd_fast.ops import backend
from bkd_fast.ops.backend import BACKENDS, available

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
    ),
]


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    return request.param


@pytest.fixture(params=[name for name in BACKENDS if available(name) is None], autouse=True)
def each_backend(request):
    with backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What the operators allocate without filling holds NaN: reading it shows."""

    def poison(original):
        def allocate(*arguments, **options):
            tensor = original(*arguments, **options)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.startswith("bkd_fast.ops") and type(tensor) is torch.Tensor and tensor.is_floating_point():
                tensor.fill_(float("nan"))
            return tensor

        return allocate

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
