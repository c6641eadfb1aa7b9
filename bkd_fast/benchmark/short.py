"""The short benchmark behind ``bkd-fast bench``: a table of this machine's backends, to choose one by."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from bkd_fast.benchmark import operators
from bkd_fast.benchmark.harness import Case, Row, measure, provider
from bkd_fast.benchmark.model import INFERENCE, MATCHED, TRAINING, inference, trainings
from bkd_fast.benchmark.results import provenance, write
from bkd_fast.errors import BKDError
from bkd_fast.ops.backend import BACKENDS, available

NAMES = (*operators.OPERATORS, TRAINING, INFERENCE)
PEERS = (operators.TORCHVISION, operators.DENSE_CONV)
LABEL, CELL = 46, 19  # widths


def bench(
    device: str = "cpu",
    *,
    threads: int | None = None,
    only: Sequence[str] | None = None,
    seconds: float = 0.2,
    csv: Path | None = None,
) -> list[Row]:
    """Print a table: each operator at one level of two teachers, a training step and inference with the smaller one.

    Args:
        device: ``cpu`` or ``cuda``.
        threads: of the CPU; None = torch's current number.
        only: of NAMES; None = all.
        seconds: for each provider of a case; it makes at least three calls.
        csv: a file for the measurements, with quantiles and temporary memory.

    Returns:
        All measurements.

    Raises:
        BKDError: an unknown name, a device that is not there, or a number out of range.
    """
    _check(device, threads, only, seconds)
    columns = [*(provider(name) for name in BACKENDS if available(name) is None), *PEERS]
    before = torch.get_num_threads()
    rows: list[Row] = []
    try:
        torch.set_num_threads(threads or before)
        print("\n".join(_heading(columns, device)), flush=True)
        title = None
        for case in _cases(device, only):
            measured = measure(_within(case, columns), seconds)
            if case.op != title:
                print(case.op)
                title = case.op
            print("\n".join(_lines(measured, columns)), flush=True)
            rows += measured
    finally:
        torch.set_num_threads(before)
    if csv is not None:
        write(rows, csv, device)
    return rows


def _check(device: str, threads: int | None, only: Sequence[str] | None, seconds: float) -> None:
    for name in only or ():
        if name not in NAMES:
            raise BKDError(f"there is no benchmark {name!r}: choose some of {', '.join(NAMES)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise BKDError("device 'cuda' was asked for, and torch sees no CUDA device: use --device cpu")
    if threads is not None and threads < 1:
        raise BKDError(f"threads is {threads}: expected 1 or more")
    if not 0 < seconds < float("inf"):
        raise BKDError(f"seconds is {seconds}: expected a finite number above 0")


def _cases(device: str, only: Sequence[str] | None) -> Iterator[Case]:
    yield from operators.cases(operators.SHORT, device, only)
    if only is None or TRAINING in only:
        for training in trainings(["Lite0"], [MATCHED], device=device):
            yield training.case()
    if only is None or INFERENCE in only:
        yield inference("Lite0", device)


def _within(case: Case, columns: Sequence[str]) -> Case:
    """Without what has no column."""
    kept = [
        {name: call for name, call in calls.items() if name in columns} for calls in (case.providers, case.unchecked)
    ]
    return case._replace(providers=kept[0], unchecked=kept[1])


def _heading(columns: Sequence[str], device: str) -> list[str]:
    where = provenance(device)
    return [
        f"{where['machine']}, threads: {torch.get_num_threads()}; bkd_fast {where['bkd_fast']}, torch {where['torch']}",
        "median ms, and how many times the first backend's; WRN50: WideResNet50, Lite0: EfficientNet-Lite0, 256 x 256",
        " " * LABEL + "".join(f"{name:>{CELL}}" for name in columns),
    ]


def _lines(rows: Sequence[Row], columns: Sequence[str]) -> list[str]:
    """One case as a line of times; of the model, another of images per second."""
    times = {row.provider: row.p50 for row in rows}
    cells = []
    for name in columns:
        ratio = f" ({times[name] / rows[0].p50:5.2f} x)" if name in times else ""
        cells.append(f"{times[name]:.2f}{ratio}" if name in times else "–")
    what = {"forward": "forward", operators.BOTH: "and backward"}.get(rows[0].what, "")
    shape = re.sub(r" (channels_last|N=1(?= ))", "", rows[0].shape)
    lines = [_line(f"  {shape} {what}", cells)]
    if rows[0].op in (TRAINING, INFERENCE):
        images = int(re.findall(r"N=(\d+)", rows[0].shape)[0])
        speeds = [f"{1e3 * images / times[name]:.1f}" if name in times else "–" for name in columns]
        lines.append(_line("    images/s", speeds))
    return lines


def _line(label: str, cells: Sequence[str]) -> str:
    return f"{label:<{LABEL}}" + "".join(f"{cell:>{CELL}}" for cell in cells)
