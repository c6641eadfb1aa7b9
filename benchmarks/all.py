"""Measure every committed CPU table and draw the picture, of one commit: python benchmarks/all.py.

It takes about 15 minutes on 2 idle cores, and refuses a checkout with changes: published results must be repeatable.
The files are written to benchmarks/results/ and docs/kernels.svg when all of them are there. Needs the extras "bench",
"export" and "anomalib". --quick measures almost nothing, to try it out, into --out.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bkd_fast.benchmark.results import provenance

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PICTURE = "benchmarks/results", "docs/kernels.svg"
# File -> script and options, then those of --quick.
COMMANDS: dict[str, tuple[list[str], list[str]]] = {
    "launches.csv": (["launches.py"], ["launches.py"]),
    "cpu.csv": (["ops.py", "--seconds", "0.3"], ["ops.py", "--quick", "--only", "distillation_loss"]),
    "cpu-scaling.csv": (
        ["ops.py", "--scaling", "--quick"],
        ["ops.py", "--scaling", "--quick", "--only", "distillation_loss"],
    ),
    "cpu-model.csv": (
        ["model.py", "--only", "inference"],
        ["model.py", "--quick", "--only", "inference", "--teacher", "ResNet18"],
    ),
    "cpu-training.csv": (
        ["model.py", "--only", "training_step", "--teacher", "Lite0"],
        ["model.py", "--quick", "--scaling", "--only", "training_step", "--teacher", "ResNet18"],
    ),
}
DRAWN = ("cpu.csv", "cpu-model.csv", "cpu-training.csv")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="measure almost nothing, of any checkout; needs --out")
    parser.add_argument("--out", type=Path, help="folder instead of the checkout")
    arguments = parser.parse_args(argv)
    if arguments.quick and not arguments.out:
        parser.error("--quick needs --out DIR: its results are not for the checkout")
    commit = provenance()["commit"]
    if commit.endswith("-dirty") and not arguments.quick:
        sys.exit(f"all.py: the checkout has changes since {commit.removesuffix('-dirty')}: commit or stash them")
    out = arguments.out or ROOT
    with tempfile.TemporaryDirectory() as folder:
        for name, commands in COMMANDS.items():
            options = commands[arguments.quick]
            timing = ["--seconds", "1e-6"] if arguments.quick and name != "launches.csv" else []
            execute([*options, *timing, "--csv", f"{folder}/{name}"])
        execute(["plot.py", *(f"{folder}/{name}" for name in DRAWN), "--out", f"{folder}/{Path(PICTURE).name}"])
        for name in COMMANDS:
            (out / RESULTS).mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(folder) / name, out / RESULTS / name)
        (out / PICTURE).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(folder) / Path(PICTURE).name, out / PICTURE)


def execute(command: list[str]) -> None:
    """Run a script of this folder; its failure ends this one."""
    begin = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, str(ROOT / "benchmarks" / command[0]), *command[1:]], env=environment, check=True)
    print(f"{time.monotonic() - begin:.0f} s: {' '.join(command)}", flush=True)


if __name__ == "__main__":
    main()
