"""The operators under pytest-benchmark, so that a change can be compared with the commit before it.

    pytest tests/benchmarks --benchmark-enable --benchmark-only --benchmark-save=before
    pytest tests/benchmarks --benchmark-enable --benchmark-only --benchmark-compare --benchmark-group-by=name

One level of each teacher and one image, on every available backend. Without ``--benchmark-enable`` each case runs once.
"""

import pytest
import torch

from bkd_fast.benchmark.harness import REFERENCE
from bkd_fast.benchmark.operators import SHORT, cases

CASES = [
    pytest.param(case, call, id=f"{case.op}-{case.shape}-{case.what}-{name}".replace(" ", "-"))
    for case in cases(SHORT)
    for name, call in case.providers.items()
    if name.startswith("bkd_fast") or name == REFERENCE
]


@pytest.mark.slow
@pytest.mark.parametrize(("case", "call"), CASES)
def test_operator(case, call, benchmark):
    with torch.set_grad_enabled(case.what != "forward"):
        benchmark(call)
