"""``bkd-fast update``."""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "take further good images into a run, without training"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("good", type=Path, metavar="GOOD", help="folder of good images that the run does not have")
    parser.add_argument("--dry-run", action="store_true", help="measure and warn, and leave the run as it is")
    parser.add_argument("--skip-unreadable", action="store_true", help="leave out images that cannot be decoded")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto (default: %(default)s)")


def run(arguments: argparse.Namespace) -> None:
    from bkd_fast.evaluation.update import update

    print(update(**vars(arguments)))
