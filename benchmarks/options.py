"""The command line that ops.py and model.py share, and the loop over their cases."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from bkd_fast.benchmark.harness import REFERENCE, Case, Row, measure
from bkd_fast.benchmark.results import means, show, write

SECONDS, QUICK_SECONDS = 0.6, 0.2  # for each provider of a case


def parser(description: str | None, choices: Sequence[str]) -> argparse.ArgumentParser:
    """Return the options of both scripts."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help="fewer shapes, shorter timings")
    made.add_argument("--scaling", action="store_true", help="own backends with one thread and with all of them")
    made.add_argument("--only", choices=choices, nargs="+", metavar="OP", help=f"some of: {', '.join(choices)}")
    made.add_argument("--threads", type=int, help="threads (default: torch's)")
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    made.add_argument("--seconds", type=float, help="time for each provider of a case; it makes at least three calls")
    made.add_argument("--csv", type=Path, help="file to write")
    return made


def parse(made: argparse.ArgumentParser) -> argparse.Namespace:
    """Return the arguments of the command line, and set torch's threads."""
    arguments = made.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        made.error("--device cuda: torch sees no CUDA device")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.seconds is None:
        arguments.seconds = QUICK_SECONDS if arguments.quick else SECONDS
    return arguments


@contextmanager
def fp32_precision(name: str) -> Iterator[None]:
    """Let CUDA compute products of float32 numbers as ``ieee`` or ``tf32`` inside the ``with`` block."""
    switches = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = name
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value


def run(cases: Iterable[Case], arguments: argparse.Namespace) -> None:
    """Measure and print each case, then the means; rewrite the CSV after every case."""
    rows: list[Row] = []
    threads = tuple(dict.fromkeys((1, torch.get_num_threads()))) if arguments.scaling else ()
    for case in map(_own_alone, cases) if arguments.scaling else cases:
        measured = measure(case, arguments.seconds, threads=threads)
        print(show(measured), flush=True)
        rows += measured
        if arguments.csv:
            write(rows, arguments.csv, arguments.device)
    print(f"\n{means(rows)}")


def _own_alone(case: Case) -> Case:
    """A case with the compiled backends alone, in the layout that is given; with the reference if there are none."""
    own = {name: call for name, call in case.providers.items() if name.startswith("bkd_fast") and "," not in name}
    return case._replace(providers=own or {REFERENCE: case.providers[REFERENCE]}, unchecked={})
