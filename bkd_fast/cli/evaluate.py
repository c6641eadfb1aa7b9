"""``bkd-fast evaluate``."""

from __future__ import annotations

import argparse
from pathlib import Path

from bkd_fast.cli.options import add_logger

SUMMARY = "measure a run on test images and write its report"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("data", type=Path, nargs="?", help="data set (default: the one the run was trained on)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the results (default: RUN)")
    parser.add_argument("--anomalous", type=Path, help="with a plain folder: defective images")
    parser.add_argument("--masks", type=Path, help="with --anomalous: their masks, found by relative path")
    parser.add_argument("--roi", type=Path, metavar="DIR", help="of a run with a mask for each image: their masks")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto (default: %(default)s)")
    parser.add_argument("--skip-unreadable", action="store_true", help="leave out images that cannot be decoded")
    add_logger(parser)


def run(arguments: argparse.Namespace) -> None:
    from bkd_fast.evaluation.evaluate import evaluate, table
    from bkd_fast.evaluation.published import comparison

    metrics = evaluate(**vars(arguments))
    print(table(metrics))
    beside = comparison(metrics)
    if beside:
        print(f"\n{beside}\n")
    print(f"report: {(arguments.out or arguments.run) / 'report.html'}")
