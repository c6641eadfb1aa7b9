"""``bkd-fast info``."""

from __future__ import annotations

import argparse
import json

SUMMARY = "versions, devices and which kernels are built"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(arguments: argparse.Namespace) -> None:
    from bkd_fast.evaluation.environment import describe, render

    facts = describe()
    print(json.dumps(facts, indent=2) if arguments.json else render(facts))
