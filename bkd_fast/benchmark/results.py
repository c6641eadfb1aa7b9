"""Measurements as CSV, as text, and as means over the shapes of an operator."""

from __future__ import annotations

import csv
import datetime
import math
import os
import platform
import re
import subprocess
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from bkd_fast.benchmark.harness import Row
from bkd_fast.evaluation.environment import installed_version
from bkd_fast.files import atomic_write

COLUMNS = {  # of the CSV -> field of Row
    "op": "op", "shape": "shape", "dtype": "dtype", "pass": "what", "provider": "provider", "threads": "threads",
    "p20_ms": "p20", "p50_ms": "p50", "p80_ms": "p80", "extra_mb": "extra", "elements": "elements",
}  # fmt: skip
PACKAGES = ("bkd_fast", "torch", "triton", "torchvision", "onnxruntime", "openvino", "anomalib")
ROOT = Path(__file__).resolve().parents[2]


def write(rows: Sequence[Row], path: Path, device: str = "cpu") -> None:
    """Write rows as CSV: COLUMNS, then :func:`provenance`."""
    digits = {"p20": 3, "p50": 3, "p80": 3, "extra": 1}
    lines = []
    for row in rows:
        values = {name: getattr(row, field) for name, field in COLUMNS.items()}
        rounded = {name: f"{values[name]:.{digits[field]}f}" for name, field in COLUMNS.items() if field in digits}
        lines.append({**values, **rounded})
    write_lines(lines, path, device)


def write_lines(lines: Sequence[Mapping[str, object]], path: Path, device: str = "cpu") -> None:
    """Write lines as CSV, a column for each name; :func:`provenance` fills in what a line does not say."""
    lines = [
        {**line, **{name: value for name, value in provenance(device).items() if name not in line}} for line in lines
    ]
    names = list(dict.fromkeys(name for line in lines for name in line))
    with atomic_write(path) as file:
        writer = csv.DictWriter(file, names, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def read(path: Path) -> list[Row]:
    """Return the rows that :func:`write` wrote."""
    kinds = {"threads": int, "elements": int, "p20": float, "p50": float, "p80": float, "extra": float}
    with path.open(encoding="utf-8", newline="") as file:
        return [
            Row(**{field: kinds.get(field, str)(line[name]) for name, field in COLUMNS.items() if name in line})
            for line in csv.DictReader(file)
        ]


@cache
def provenance(device: str = "cpu") -> dict[str, str]:
    """Return commit, date, machine, threads and versions: what a measurement cannot be compared without.

    ``commit`` is empty where the package is not a checkout, and ends in ``-dirty`` where files differ from it.
    """
    cpu = f"{_processor()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    return {
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
        "machine": f"{torch.cuda.get_device_name()}, {cpu}" if device == "cuda" else cpu,
        "threads": str(torch.get_num_threads()),
        **{name: installed_version(name) for name in PACKAGES},
    }


def _commit() -> str:
    if not (ROOT / ".git").exists():
        return ""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


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
