"""``bkd-fast calibrate``."""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "set a run's thresholds from new good images"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument(
        "good", type=Path, nargs="?", metavar="GOOD", help="new good images (default: the run's scores)"
    )
    parser.add_argument("--false-alarms", type=float, metavar="RATE", help="wanted rate (default: the run's)")
    parser.add_argument("--defects", type=Path, metavar="DIR", help="say how many of these defective images are found")
    parser.add_argument("--roi", type=Path, metavar="DIR", help="of a run with a mask for each image: their masks")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto (default: %(default)s)")


def run(arguments: argparse.Namespace) -> None:
    from bkd_fast.evaluation.calibrate import calibrate

    print(calibrate(**vars(arguments)))
