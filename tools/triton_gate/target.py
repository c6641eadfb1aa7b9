"""A stand-in for a GPU's driver, so that Triton compiles for an architecture that is not there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver


class Target:
    """What Triton asks of a driver before it launches."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture  # Triton keeps what it has compiled for each device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def compiling_for(architecture: int) -> Iterator[None]:
    """Inside, Triton takes the device to be of an architecture: 80 for 8.0."""
    before = driver._active
    driver.set_active(Target(architecture))
    try:
        yield
    finally:
        driver._active = before
