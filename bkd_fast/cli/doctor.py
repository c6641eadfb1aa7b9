"""``bkd-fast doctor``."""

from __future__ import annotations

import argparse
from pathlib import Path

from bkd_fast.cli.options import add_options, config_from

SUMMARY = "check machine, teacher and images before a training; exit status 1 if something would stop it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", type=Path, nargs="?", help="what train would be given (default: no images)")
    parser.add_argument("--out", type=Path, default=Path(), metavar="DIR", help="where the run would be written")
    add_options(parser)


def run(arguments: argparse.Namespace) -> int:
    from bkd_fast.evaluation.doctor import examine, table

    findings = examine(arguments.data, config_from(arguments), arguments.out)
    print(table(findings))
    return int(any(finding.state == "stop" for finding in findings))
