"""Installed versions, devices, and the kernels that are available."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

import torch

from bkd_fast import ops
from bkd_fast.ops.backend import available
from bkd_fast.version import __version__

PACKAGES = ("torch", "torchvision", "timm", "triton", "numpy", "lightning-fabric", "safetensors", "scikit-image")


def describe() -> dict[str, Any]:
    """Return versions, devices, threads and operator backends, as JSON values."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "bkd_fast": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: installed_version(name) for name in PACKAGES},
        "cpu": {
            "capability": torch.backends.cpu.get_cpu_capability(),
            "kernels": _kernels(),
            "threads": torch.get_num_threads(),
        },
        "cuda": {
            "torch_built_for": torch.version.cuda,
            "kernels": _cuda_kernels(),
            "triton_kernels": _triton_kernels(gpus),
            "devices": gpus,
        },
        "operators": ops.describe(),
    }


def _kernels() -> str:
    """Return the instruction set of the compiled CPU kernels, and those to choose from."""
    if available("native") is not None:
        return "none"
    from bkd_fast.ops.cpu_common import simd_tier, simd_tiers

    return f"{simd_tier()} (of {', '.join(simd_tiers())})"


def _cuda_kernels() -> str:
    """Return whether there are compiled CUDA kernels, or why not."""
    if available("native") is not None:
        return "none"
    from bkd_fast.ops import native

    return native.without_cuda or "available"


def _triton_kernels(gpus: list[str]) -> str:
    """Return whether Triton's kernels can be compiled and run, or what is missing."""
    missing = available("triton")
    if missing is None and not gpus:
        return "compiled when they first run, on a CUDA device; there is none (or no driver)"
    return missing or "available: compiled when they first run"


def render(facts: dict[str, Any]) -> str:
    """Return the result of :func:`describe` as indented lines."""
    lines: list[str] = []

    def walk(value: Any, depth: int) -> None:
        for name, item in value.items():
            if isinstance(item, dict):
                lines.append(f"{'  ' * depth}{name}")
                walk(item, depth + 1)
            else:
                shown = ", ".join(map(str, item)) or "none" if isinstance(item, list) else item
                lines.append(f"{'  ' * depth}{name}: {shown}")

    walk(facts, 0)
    return "\n".join(lines)


def installed_version(package: str) -> str:
    """Return the version of an installed package, or ``not installed``."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
