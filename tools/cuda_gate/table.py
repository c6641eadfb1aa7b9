"""How many blocks of a kernel a multiprocessor holds, and a table of it."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from tools.cuda_gate.compiling import ARCHITECTURES, Kernel

HERE = Path(__file__).resolve().parent
# Of a multiprocessor (CUDA C++ Programming Guide, compute capabilities): warps, blocks, KB of shared memory.
LIMITS = {
    "75": (32, 16, 64), "80": (64, 32, 164), "86": (48, 16, 100), "89": (48, 24, 100), "90": (64, 32, 228),
    "100": (64, 32, 228), "120": (48, 24, 100),
}  # fmt: skip


def blocks(kernel: Kernel) -> int:
    """Blocks of a multiprocessor, by registers, shared memory and warps."""
    warps, most, kilobytes = LIMITS[kernel.architecture]
    own_warps = kernel.threads // 32
    registers = -(-kernel.registers * 32 // 256) * 256 * own_warps  # a warp's come in units of 256
    reserved = 0 if kernel.architecture == "75" else 1024
    shared = kernel.shared + dynamic(kernel) + reserved
    return min(65536 // registers, warps // own_warps, most, kilobytes * 1024 // max(shared, 1))


def dynamic(kernel: Kernel) -> int:
    """Bytes of shared memory that a launch asks for, which the compiler does not know: launches.csv."""
    with open(HERE / "launches.csv", newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if kernel.name.startswith(row["kernel"])]
    return int(rows[0]["dynamic"]) if rows else 0


def table(kernels: Sequence[Kernel]) -> str:
    """Registers and blocks for each architecture, shared memory where it is largest."""
    compiled = {kernel.architecture for kernel in kernels}
    architectures = [one for one in ARCHITECTURES if one in compiled]
    lines = [
        "| kernel | shared, KB | " + " | ".join(f"{one[:-1]}.{one[-1]}" for one in architectures) + " |",
        "|---|---|" + "---|" * len(architectures),
    ]
    for name in sorted({kernel.name for kernel in kernels}):
        own = {kernel.architecture: kernel for kernel in kernels if kernel.name == name}
        shared = max(kernel.shared + dynamic(kernel) for kernel in own.values()) / 1024
        cells = [f"{own[one].registers} / {blocks(own[one])}" for one in architectures]
        lines.append(f"| `{name}` | {shared:.1f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
