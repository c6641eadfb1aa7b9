"""What the kernels may need: budget.csv, and the instructions that they must have: instructions.csv."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from tools.cuda_gate.compiling import Kernel

HERE = Path(__file__).resolve().parent
FIELDS = ("kernel", "architecture", "registers", "shared", "stack")


def read_budget() -> dict[tuple[str, str], tuple[int, int, int]]:
    """Registers, shared memory and stack by kernel and architecture."""
    with open(HERE / "budget.csv", newline="", encoding="utf-8") as file:
        return {
            (row["kernel"], row["architecture"]): (int(row["registers"]), int(row["shared"]), int(row["stack"]))
            for row in csv.DictReader(file)
        }


def write_budget(kernels: Sequence[Kernel]) -> None:
    """What they need now becomes what they may need."""
    with open(HERE / "budget.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(FIELDS)
        for kernel in sorted(kernels):
            writer.writerow((kernel.name, kernel.architecture, kernel.registers, kernel.shared, kernel.stack))


def read_instructions() -> list[tuple[str, str, int]]:
    """Kernels (by how their name begins), an instruction, and the architecture from which on they must have it."""
    with open(HERE / "instructions.csv", newline="", encoding="utf-8") as file:
        return [(row["kernel"], row["instruction"], int(row["from"])) for row in csv.DictReader(file)]


def faults(kernels: Sequence[Kernel]) -> list[str]:
    """Return what is not as it should be on the architectures of ``kernels``."""
    compiled = {kernel.architecture for kernel in kernels}
    allowed = {key: limits for key, limits in read_budget().items() if key[1] in compiled}
    found = []
    for kernel in kernels:
        label = f"{kernel.name} on {kernel.architecture}"
        limits = allowed.get((kernel.name, kernel.architecture))
        if kernel.spills:
            found.append(f"{label} spills {kernel.spills} bytes")
        if limits is None:
            found.append(f"{label} has no budget")
            continue
        needs = (kernel.registers, kernel.shared, kernel.stack)
        for what, need, limit in zip(
            ("registers", "bytes of shared memory", "bytes of stack"), needs, limits, strict=True
        ):
            if need > limit:
                found.append(f"{label} needs {need} {what}, allowed are {limit}")
    for name, architecture in sorted(set(allowed) - {(kernel.name, kernel.architecture) for kernel in kernels}):
        found.append(f"{name} on {architecture} has a budget and does not exist")
    for name, instruction, first in read_instructions():
        own = [kernel for kernel in kernels if kernel.name.startswith(name) and int(kernel.architecture) >= first]
        if not any(kernel.name.startswith(name) for kernel in kernels):
            found.append(f"no kernel begins with {name}")
        found += [
            f"{kernel.name} on {kernel.architecture} has no {instruction}"
            for kernel in own
            if instruction not in kernel.instructions
        ]
    return found
