"""``bkd-fast check``."""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "compare an exported model with its run; exit status 1 if it does not compute the same"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL", help="a file that export wrote, of any format")
    parser.add_argument("run", type=Path, metavar="RUN", help="the run that it was exported from")
    parser.add_argument("images", type=Path, metavar="GOOD", help="folder of images that the run was not trained on")
    parser.add_argument("--limit", type=int, default=200, metavar="N", help="images, at most (default: %(default)s)")
    parser.add_argument("--threads", type=int, metavar="N", help="of both run-times (default: torch's number)")


def run(arguments: argparse.Namespace) -> int:
    from bkd_fast.export import check

    comparison = check(**vars(arguments))
    print(comparison.table())
    print("FAILED: do not use this model" if comparison.failures else "ok: the model computes what the run does")
    return int(bool(comparison.failures))
