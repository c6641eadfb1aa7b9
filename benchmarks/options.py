"""The command line that the scripts share, and what they do with their cases."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from bkd_fast.benchmark.harness import REFERENCE, Case, Row, measure
from bkd_fast.benchmark.results import means, show, write

SECONDS, QUICK_SECONDS = 0.6, 0.2  # for each provider of a case


def parser(description: str | None, choices: Sequence[str], *, dtypes: bool = False) -> argparse.Namespace:
    """The arguments of ``ops.py`` and ``model.py``; torch's threads are set."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help="fewer shapes, shorter timings")
    made.add_argument("--scaling", action="store_true", help="own backends at one thread and at all of them")
    made.add_argument("--only", choices=choices, nargs="+", metavar="OP", help=f"some of: {', '.join(choices)}")
    made.add_argument("--threads", type=int, help="threads (default: torch's)")
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    if dtypes:
        kinds = ("float32", "float16", "bfloat16")
        made.add_argument("--dtype", choices=kinds, default=kinds[0], help="of all tensors (default: %(default)s)")
    made.add_argument("--seconds", type=float, help="time for each provider of a case; three calls are the least")
    made.add_argument("--csv", type=Path, help="file to write")
    arguments = made.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.seconds is None:
        arguments.seconds = QUICK_SECONDS if arguments.quick else SECONDS
    return arguments


def own_alone(case: Case) -> Case:
    """A case with the compiled backends alone, in the layout that is given; with the reference if there are none."""
    own = {name: call for name, call in case.providers.items() if name.startswith("bkd_fast") and "," not in name}
    return case._replace(providers=own or {REFERENCE: case.providers[REFERENCE]}, unchecked={})


def run(cases: Iterable[Case], arguments: argparse.Namespace, threads: tuple[int, ...] = ()) -> None:
    """Measures case after case, prints each, then the means, and writes the CSV after every case."""
    rows: list[Row] = []
    for case in cases:
        found = measure(case, arguments.seconds, threads=tuple(dict.fromkeys(threads)))
        print(show(found), flush=True)
        rows += found
        if arguments.csv:
            write(rows, arguments.csv, arguments.device)
    print(f"\n{means(rows)}")
