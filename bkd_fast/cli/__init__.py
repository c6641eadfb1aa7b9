"""The command line, ``bkd-fast``: one module a command, with SUMMARY, ``add_arguments`` and ``run``.

A command imports what it needs when it runs: ``bkd-fast --help`` does not wait for torch.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from importlib import import_module

from bkd_fast.errors import BKDError
from bkd_fast.version import __version__

COMMANDS = (
    "demo",
    "train",
    "evaluate",
    "calibrate",
    "predict",
    "ablate",
    "export",
    "weights",
    "doctor",
    "info",
    "bench",
)
EPILOG = """examples:
  bkd-fast demo                                   train, evaluate and report on the built-in data
  bkd-fast train parts/ --out runs/parts          one model for a folder of good images (or MVTec AD's layout)
  bkd-fast evaluate runs/parts                    metrics, scores.csv and report.html on the test images
  bkd-fast calibrate runs/parts good/ --false-alarms 0.02  thresholds from new good images
  bkd-fast predict runs/parts new/*.png --out out/  scores, decisions, heat maps and masks
  bkd-fast ablate mvtec/ --table 4 --out runs/table4   the paper's ablations, over several seeds
  bkd-fast export runs/parts --format onnx          the model for another run-time
  bkd-fast doctor parts/                          what would stop or spoil a training, before it starts
  bkd-fast weights resnet18 --out resnet18.safetensors  a teacher's weights, for a machine without a network
  bkd-fast bench                                  how fast this machine is, on every backend it has
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status (0 done, 1 unusable input or a doctor's finding, 130 interrupted)."""
    arguments = parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for chatty in ("lightning_fabric", "timm", "httpx", "PIL"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        return arguments.run(arguments) or 0
    except BKDError as error:
        print(f"bkd-fast: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        hints = {"train": "; rerun the same command with --resume", "ablate": "; the same command resumes"}
        print(f"bkd-fast: interrupted{hints.get(arguments.command, '')}", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="bkd-fast",
        description="Finds defects after seeing good parts only: bidirectional knowledge distillation.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"bkd_fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = import_module(f"bkd_fast.cli.{name}")
        summary = module.SUMMARY
        command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        command.set_defaults(run=module.run)
        module.add_arguments(command)
    return parser
