"""What was measured, as CSV, as text, and as means over the shapes of an operator."""

from __future__ import annotations

import csv
import math
import os
import platform
import re
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from bkd_fast.benchmark.harness import Row
from bkd_fast.evaluation.environment import installed_version
from bkd_fast.files import atomic_write

COLUMNS = ("op", "shape", "dtype", "pass", "provider", "threads", "p20_ms", "p50_ms", "p80_ms", "extra_mb")
PACKAGES = ("bkd_fast", "torch", "torchvision", "onnxruntime", "openvino", "anomalib")


def write(rows: Sequence[Row], path: Path, device: str = "cpu") -> None:
    """The rows as CSV: COLUMNS, then the machine and the versions of PACKAGES, the same in every row."""
    where = versions(device)
    with atomic_write(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*COLUMNS, *where])
        for row in rows:
            times = [f"{value:.3f}" for value in (row.p20, row.p50, row.p80)]
            figures = [row.provider, row.threads, *times, f"{row.extra:.1f}"]
            writer.writerow([row.op, row.shape, row.dtype, row.what, *figures, *where.values()])


def read(path: Path) -> list[Row]:
    """The inverse of :func:`write`, without machine and versions."""
    with path.open(encoding="utf-8", newline="") as file:
        return [
            Row(
                op=line["op"],
                shape=line["shape"],
                what=line["pass"],
                provider=line["provider"],
                threads=int(line["threads"]),
                p20=float(line["p20_ms"]),
                p50=float(line["p50_ms"]),
                p80=float(line["p80_ms"]),
                extra=float(line["extra_mb"]),
                dtype=line["dtype"],
            )
            for line in csv.DictReader(file)
        ]


@cache
def versions(device: str = "cpu") -> dict[str, str]:
    """The machine and what is installed."""
    cpu = f"{_processor()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    machine = f"{torch.cuda.get_device_name()}, {cpu}" if device == "cuda" else cpu
    return {"machine": machine, **{name: installed_version(name) for name in PACKAGES}}


def show(rows: Sequence[Row]) -> str:
    """One case: the time of every provider, its ratio to the first, and its temporary memory."""
    lines = [f"\n{rows[0].op}  {rows[0].shape}  {rows[0].what}"]
    for row, name in zip(rows, _names(rows), strict=True):
        times = f"{row.p50:9.2f} ms  {row.p50 / rows[0].p50:7.2f} x"
        lines.append(f"  {name:<40} {times}  {row.extra:8.1f} MB extra")
    return "\n".join(lines)


class Group(NamedTuple):
    """Shapes of one operator that differ in sizes alone, as one provider computes them."""

    op: str
    label: str
    what: str
    provider: str


def relative(rows: Sequence[Row]) -> dict[Group, float]:
    """Geometric means over each group of the times relative to the first provider's."""
    first: dict[tuple[str, ...], float] = {}
    ratios: dict[Group, list[float]] = defaultdict(list)
    for row, name in zip(rows, _names(rows), strict=True):
        own = first.setdefault((row.op, row.shape, row.what), row.p50)
        # A shape without its sizes: "WRN50 N=1 C=256 H=W=64 I=200 sparse" -> "WRN50 N=1 sparse".
        ratios[Group(row.op, re.sub(r" (C|H=W|I)=\d+", "", row.shape), row.what, name)].append(row.p50 / own)
    return {group: math.exp(sum(map(math.log, values)) / len(values)) for group, values in ratios.items()}


def means(rows: Sequence[Row]) -> str:
    """:func:`relative` as text."""
    lines = {" | ".join(group): mean for group, mean in relative(rows).items()}
    width = max(map(len, lines), default=0)
    title = "geometric means, time relative to the first provider"
    return "\n".join([title, *(f"  {name:<{width}} {mean:7.2f} x" for name, mean in lines.items())])


def _names(rows: Sequence[Row]) -> list[str]:
    """Providers, with their numbers of threads where these differ."""
    several = len({row.threads for row in rows}) > 1
    return [f"{row.provider}, threads: {row.threads}" if several else row.provider for row in rows]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
