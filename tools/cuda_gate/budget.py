"""The resources that kernels may use (budget.csv), the instructions that they must contain (instructions.csv), and how
many they may issue per tensor-core instruction (issue.csv)."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from tools.cuda_gate.compiling import SPECIFIC, Kernel

HERE = Path(__file__).resolve().parent
FIELDS = ("kernel", "architecture", "registers", "shared", "stack")


def read_budget() -> dict[tuple[str, str], tuple[int, int, int]]:
    """Return registers, shared memory and stack by kernel and architecture."""
    with open(HERE / "budget.csv", newline="", encoding="utf-8") as file:
        return {
            (row["kernel"], row["architecture"]): (int(row["registers"]), int(row["shared"]), int(row["stack"]))
            for row in csv.DictReader(file)
        }


def write_budget(kernels: Sequence[Kernel]) -> None:
    """Make the present resources the budget."""
    with open(HERE / "budget.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(FIELDS)
        for kernel in sorted(kernels):
            writer.writerow((kernel.name, kernel.architecture, kernel.registers, kernel.shared, kernel.stack))


def read_instructions() -> list[tuple[str, str, str]]:
    """Return prefixes of kernel names, an instruction, and the first architecture that must have it."""
    with open(HERE / "instructions.csv", newline="", encoding="utf-8") as file:
        return [(row["kernel"], row["instruction"], row["from"]) for row in csv.DictReader(file)]


def read_issue() -> list[tuple[str, str, float]]:
    """Return prefixes of kernel names, the first architecture, and the max instructions per tensor-core one."""
    with open(HERE / "issue.csv", newline="", encoding="utf-8") as file:
        return [(row["kernel"], row["from"], float(row["max"])) for row in csv.DictReader(file)]


def concerns(first: str, architecture: str) -> bool:
    """Return whether a rule from an architecture on holds for another; one from 90a holds for 90a alone."""
    return architecture == first if first.endswith("a") else int(architecture.rstrip("a")) >= int(first)


def faults(kernels: Sequence[Kernel]) -> list[str]:
    """Return what exceeds the budget or is missing on the architectures of ``kernels``."""
    compiled = {kernel.architecture for kernel in kernels}
    allowed = {key: limits for key, limits in read_budget().items() if key[1] in compiled}
    messages = []
    for kernel in kernels:
        label = f"{kernel.name} on {kernel.architecture}"
        limits = allowed.get((kernel.name, kernel.architecture))
        if kernel.spills:
            messages.append(f"{label} spills {kernel.spills} bytes")
        if limits is None:
            messages.append(f"{label} has no budget")
            continue
        needs = (kernel.registers, kernel.shared, kernel.stack)
        for what, need, limit in zip(
            ("registers", "bytes of shared memory", "bytes of stack"), needs, limits, strict=True
        ):
            if need > limit:
                messages.append(f"{label} needs {need} {what}, allowed are {limit}")
    for name, architecture in sorted(set(allowed) - {(kernel.name, kernel.architecture) for kernel in kernels}):
        messages.append(f"{name} on {architecture} has a budget and does not exist")
    others = [architecture for architecture in SPECIFIC if architecture not in compiled]
    instructions = [row for row in read_instructions() if row[2] not in others]
    issue = [row for row in read_issue() if row[1] not in others]
    messages += [
        f"no kernel begins with {prefix}"
        for prefix in sorted({row[0] for row in (*instructions, *issue)})
        if not any(kernel.name.startswith(prefix) for kernel in kernels)
    ]
    for kernel in kernels:
        label, architecture = f"{kernel.name} on {kernel.architecture}", kernel.architecture
        for prefix, instruction, first in instructions:
            concerned = kernel.name.startswith(prefix) and concerns(first, architecture)
            if concerned and instruction not in kernel.instructions:
                messages.append(f"{label} has no {instruction}")
        for prefix, first, most in issue:
            concerned = kernel.name.startswith(prefix) and concerns(first, architecture)
            if concerned and not 0 < kernel.issued <= most:
                ratio = f"{kernel.issued} instructions per tensor-core instruction"
                messages.append(f"{label} issues {ratio}, allowed are {most}")
    return messages
