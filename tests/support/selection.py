"""What `make test` runs of the tests that execute GPU kernels on the CPU: one case an operator."""

from pathlib import Path

import pytest
import torch

NAMES = ("conv", "gather", "attention", "anomaly", "loss: pixel", "match", "wgmma")


def mark_the_rest_slow(items: list[pytest.Item], folder: Path) -> None:
    """Mark all tests of a folder as slow but one agreement with the reference an operator, in float16."""
    for item in items:
        if folder in item.path.parents and not _selected(item):
            item.add_marker(pytest.mark.slow)


def _selected(item: pytest.Item) -> bool:
    given = item.callspec.params if hasattr(item, "callspec") else {}
    return (
        "with_the_reference" in item.name
        and given["name"] in NAMES
        and given.get("kind", given.get("dtype")) in ("float16", torch.float16)
        and given.get("order", "forward") == "forward"
    )
