"""Registers and occupancy (blocks per multiprocessor) of every kernel, as a table."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tools.cuda_gate.compiling import ARCHITECTURES, Kernel

# Max warps, blocks and KB of shared memory per multiprocessor (CUDA C++ Programming Guide, compute capabilities).
LIMITS = {
    "75": (32, 16, 64), "80": (64, 32, 164), "86": (48, 16, 100), "89": (48, 24, 100), "90": (64, 32, 228),
    "90a": (64, 32, 228), "100": (64, 32, 228), "120": (48, 24, 100),
}  # fmt: skip


def blocks(kernel: Kernel) -> int:
    """Return the blocks per multiprocessor that registers, shared memory and warps allow."""
    warps, max_blocks, kilobytes = LIMITS[kernel.architecture]
    own_warps = kernel.threads // 32
    registers = -(-kernel.registers * 32 // 256) * 256 * own_warps  # allocated per warp in units of 256
    reserved = 0 if kernel.architecture == "75" else 1024
    shared = kernel.shared + reserved
    return min(65536 // registers, warps // own_warps, max_blocks, kilobytes * 1024 // max(shared, 1))


def table(kernels: Sequence[Kernel]) -> str:
    """Return registers and blocks per architecture, and the largest shared memory, as a Markdown table."""
    compiled = {kernel.architecture for kernel in kernels}
    architectures = [one for one in ARCHITECTURES if one in compiled]
    lines = [
        "| kernel | shared, KB | " + " | ".join(re.sub(r"(\da?)$", r".\1", one) for one in architectures) + " |",
        "|---|---|" + "---|" * len(architectures),
    ]
    for name in sorted({kernel.name for kernel in kernels}):
        own = {kernel.architecture: kernel for kernel in kernels if kernel.name == name}
        shared = max(kernel.shared for kernel in own.values()) / 1024
        cells = [f"{own[one].registers} / {blocks(own[one])}" if one in own else "" for one in architectures]
        lines.append(f"| `{name}` | {shared:.1f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
