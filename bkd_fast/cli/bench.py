"""``bkd-fast bench``."""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "time operators, a training step and inference on this machine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: one a core)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some operators, training_step or inference")
    parser.add_argument("--seconds", type=float, default=0.2, help="time for each provider (default: %(default)s)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write measurements there, with quantiles and memory")


def run(arguments: argparse.Namespace) -> None:
    from bkd_fast.benchmark.short import bench

    bench(**vars(arguments))
