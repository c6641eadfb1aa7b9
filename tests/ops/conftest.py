"""Fixtures of the operator tests: every device and backend there is, and poisoned memory."""

from __future__ import annotations

import poisoning
import pytest
import torch

from bkd_fast.ops import backend
from bkd_fast.ops.backend import BACKENDS, available, implementation

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
    ),
]


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    return request.param


def _exact(name: str, place: str) -> bool:
    """Whether a backend runs on a device in float64, as these tests do."""
    with backend(name):
        try:
            return bool(implementation("cosine_anomaly_map", place, torch.float64))
        except RuntimeError:
            return False


@pytest.fixture(
    params=[
        name for name in BACKENDS if available(name) is None and any(_exact(name, place) for place in ("cpu", "cuda"))
    ],
    autouse=True,
)
def each_backend(request):
    place = request.getfixturevalue("device") if "device" in request.fixturenames else "cpu"
    if not _exact(request.param, place):
        pytest.skip(f"the {request.param} backend has no float64 on {place}")
    with backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    poisoning.poison(monkeypatch)
