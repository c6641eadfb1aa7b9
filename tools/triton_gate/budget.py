"""What the Triton kernels may need: budget.csv, made with one release of Triton."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from tools.triton_gate import kernels as triton_kernels
from tools.triton_gate.kernels import Kernel

HERE = Path(__file__).resolve().parent
TRITON = "3.8"  # other releases allocate other registers
FIELDS = ("kernel", "kind", "config", "architecture", "registers", "shared", "spills")
# Of a block (CUDA C++ Programming Guide). What compiles for 8.0 also runs on 8.6 and 8.9, which have 99 KB, not 163.
MOST_SHARED = {80: 99 * 1024, 90: 227 * 1024, 120: 99 * 1024}
MULTIPLIERS = ("deform_conv",)  # by how their names begin


def read() -> dict[tuple[str, str, str, int], tuple[int, int, int]]:
    """Registers, shared memory and spills by kernel, kind, configuration and architecture."""
    with open(HERE / "budget.csv", newline="", encoding="utf-8") as file:
        return {
            (row["kernel"], row["kind"], row["config"], int(row["architecture"])): (
                int(row["registers"]), int(row["shared"]), int(row["spills"]),
            )
            for row in csv.DictReader(file)
        }  # fmt: skip


def write(kernels: Sequence[Kernel]) -> None:
    """What they need now becomes what they may need."""
    with open(HERE / "budget.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(FIELDS)
        for kernel in sorted(kernels):
            writer.writerow(kernel[: len(FIELDS)])


def faults(kernels: Sequence[Kernel]) -> list[str]:
    """What is not as it must be, whatever release of Triton compiled it."""
    found = []
    for kernel in kernels:
        name = _name(kernel)
        if kernel.spills:
            found.append(f"{name} spills registers, in {kernel.spills} instructions")
        if kernel.shared > (most := MOST_SHARED[kernel.architecture]):
            found.append(f"{name} needs {kernel.shared} bytes of shared memory, there are {most}")
        multiplies = kernel.name.startswith(MULTIPLIERS) and triton_kernels.kind_of(kernel.kind) != "ieee"
        if multiplies and not kernel.tensor_cores:
            found.append(f"{name} does not use tensor cores")
    seen = {(kernel.name, triton_kernels.kind_of(kernel.kind), kernel.config) for kernel in kernels}
    for name, kind, config in triton_kernels.space():
        if not any((name, own, config) in seen for own in ((kind,) if kind != "any" else ("half", "ieee"))):
            found.append(f"{name} in {config} ({kind}) was not compiled, and tuning may choose it")
    return found


def growth(kernels: Sequence[Kernel]) -> list[str]:
    """What needs more than its budget, has none, or is gone."""
    allowed, found = read(), []
    names = {key[0] for key in allowed}
    for kernel in kernels:
        if kernel.name not in names:  # of a new operator: :func:`faults` has the rules for it
            continue
        limits = allowed.pop(kernel[:4], None)
        if limits is None:
            found.append(f"{_name(kernel)} has no budget")
            continue
        for what, need, limit in zip(("registers", "bytes of shared memory", "spills"), kernel[4:7], limits,
                                     strict=True):  # fmt: skip
            if need > limit:
                found.append(f"{_name(kernel)} needs {need} {what}, allowed are {limit}")
    return found + [f"{', '.join(map(str, key))} has a budget and does not exist" for key in sorted(allowed)]


def _name(kernel: Kernel) -> str:
    return f"{kernel.name} for {kernel.kind} in {kernel.config} on {kernel.architecture}"
