"""Times several providers of one result against each other: checked for equality first, then run in turns."""

from __future__ import annotations

import csv
import os
import platform
import threading
import time
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bkd_fast.files import atomic_write
from bkd_fast.info import installed_version

COLUMNS = ("op", "shape", "dtype", "pass", "provider", "threads", "p20_ms", "p50_ms", "p80_ms", "extra_mb")
PACKAGES = ("bkd_fast", "torch", "torchvision", "onnxruntime", "openvino")


class Case(NamedTuple):
    """One operator at one shape. ``providers``: name -> call; ``ceilings``: the same, without a result to compare."""

    op: str
    shape: str
    what: str  # "forward" or "forward+backward"
    providers: dict[str, Callable[[], Any]]
    ceilings: dict[str, Callable[[], Any]]
    tolerance: float = 1e-4


def measure(case: Case, seconds: float) -> list[dict[str, Any]]:
    """Rows of the CSV for one case.

    Raises:
        AssertionError: a provider's result is not that of the first; nothing has been timed then.
    """
    results = {name: _tensors(call()) for name, call in case.providers.items()}
    first = next(iter(results))
    for name, found in results.items():
        for one, other in zip(found, results[first], strict=True):
            scale = max(1.0, other.abs().max().item()) if other.numel() else 1.0
            torch.testing.assert_close(
                one, other, rtol=0, atol=case.tolerance * scale, msg=lambda m, n=name: f"{case.op}: {n} != {first}: {m}"
            )
    del results
    calls = {**case.providers, **case.ceilings}
    extra = {name: extra_memory(call) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, times.values())) < 5:
        for name, call in calls.items():  # in turns: what disturbs the machine hits all alike
            begin = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - begin) * 1e3)
    rows = []
    for name, values in times.items():
        p20, p50, p80 = torch.tensor(values).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
        figures = (torch.get_num_threads(), f"{p20:.3f}", f"{p50:.3f}", f"{p80:.3f}", f"{extra[name]:.1f}")
        rows.append(
            dict(zip(COLUMNS, (case.op, case.shape, "float32", case.what, name, *figures), strict=True)) | versions()
        )
    return rows


def extra_memory(call: Callable[[], Any]) -> float:
    """Growth of the process's resident memory during one call, beyond what the result keeps, in MB (Linux only)."""
    if not Path("/proc/self/statm").exists():
        return float("nan")
    before, highest, done = _resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.is_set():
            highest = max(highest, _resident())
            time.sleep(2e-4)

    watcher = threading.Thread(target=watch)
    watcher.start()
    result = call()
    done.set()
    watcher.join()
    kept = sum(tensor.numel() * tensor.element_size() for tensor in _tensors(result))
    return max(0.0, (highest - before - kept) / 2**20)


@cache
def versions() -> dict[str, str]:
    """The machine and what is installed."""
    found = {"machine": f"{_processor()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"}
    found.update({name: installed_version(name) for name in PACKAGES})
    return found


def write(rows: list[dict[str, Any]], path: Path) -> None:
    """The rows as CSV."""
    with atomic_write(path) as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def show(rows: Iterable[dict[str, Any]], own: str) -> None:
    """Every provider's time and its ratio to ``own``."""
    rows = list(rows)
    mine = next(float(row["p50_ms"]) for row in rows if row["provider"] == own)
    print(f"\n{rows[0]['op']}  {rows[0]['shape']}  {rows[0]['pass']}")
    for row in rows:
        ratio = float(row["p50_ms"]) / mine
        print(f"  {row['provider']:<28} {float(row['p50_ms']):9.2f} ms  {ratio:7.2f} x  {row['extra_mb']:>8} MB extra")


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value.detach()]
    return [tensor for part in value for tensor in _tensors(part)]


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
