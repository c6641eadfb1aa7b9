"""The package as others get it: what `make wheels` checks. Leaves the sdist and the wheel in dist/.

The wheel is built from the sdist, and that one file is installed with each torch in a clean environment of its own:
the operator tests pass, a typed program of someone else's checks, the import is timed, and after `pip uninstall`
nothing is left. A wheel without compiled kernels passes the operator tests on the reference.

    python -m tools.wheels [TORCH ...]    # versions as pip takes them; default: the oldest supported, and the newest
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
TORCHES = ["torch==2.10.*", "torch"]
TIMED = """
from time import perf_counter
import torch
times = [perf_counter()]
import bkd_fast
times.append(perf_counter())
from bkd_fast import Detector
times.append(perf_counter())
print(f"wheels: torch {torch.__version__}; over torch, import bkd_fast takes {times[1] - times[0]:.2f} s, "
      f"Detector {times[2] - times[1]:.2f} s more")
"""


def main(torches: list[str]) -> None:
    """Builds, then checks each wheel with each torch; raises where something fails."""
    shutil.rmtree(DIST, ignore_errors=True)
    _run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(DIST), str(ROOT))
    wheel = _only(DIST, "*-abi3-*.whl")
    sdist = _only(DIST, "*.tar.gz")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
        _run(*pip, "--wheel-dir", str(folder), str(sdist), BKD_FAST_NATIVE="0")
        pure = _only(folder, "*-py3-none-any.whl")
        for torch in torches:
            environment = Environment(folder / "environment", torch)
            environment.check(wheel, backends="native, reference")
            environment.check(pure, backends="reference")
            shutil.rmtree(environment.folder)
    print(f"wheels: {sdist.name} and {wheel.name} are in {DIST}")


class Environment:
    """A virtual environment with one torch and the test tools, outside of the checkout."""

    def __init__(self, folder: Path, torch: str) -> None:
        self.folder = folder
        self.python = str(folder / "bin" / "python")
        _run(sys.executable, "-m", "venv", str(folder))
        self._pip("install", torch, "torchvision")
        self._pip("install", "pytest", "pytest-benchmark", "pytest-xdist", "hypothesis", "mypy")
        # Copies: what is imported is the installed package, not the checkout's.
        self.tests = folder / "copied" / "tests"
        shutil.copytree(ROOT / "tests", self.tests)
        for name in ("pyproject.toml", "tools/consumer.py"):
            shutil.copy(ROOT / name, self.tests.parent)

    def check(self, wheel: Path, backends: str) -> None:
        """Installs ``wheel``, whose CPU backends are ``backends``, checks it as a user has it, and uninstalls it."""
        self._pip("install", str(wheel))
        found = self._python(
            "-c", "from bkd_fast.ops.backend import usable; print(*usable('distillation_loss', 'cpu'), sep=', ')"
        )
        if found.strip() != backends:
            raise SystemExit(f"wheels: {wheel.name} runs {found.strip()} on the CPU, expected {backends}")
        print(self._python("-c", TIMED).strip(), flush=True)
        self._python("-m", "mypy", "--strict", "--follow-imports=silent", str(self.tests.parent / "consumer.py"))
        # One thread each: two processes with as many threads as there are cores hinder each other.
        tests = self._python("-m", "pytest", "-n", "auto", str(self.tests / "ops"), OMP_NUM_THREADS="1")
        print(f"wheels: {wheel.name}: {tests.strip().splitlines()[-1]}", flush=True)
        self._pip("uninstall", "--yes", "bkd_fast")
        left = [str(path) for part in ("lib", "bin") for path in (self.folder / part).rglob("*bkd?fast*")]
        if left:
            raise SystemExit(f"wheels: pip uninstall left {', '.join(left)}")

    def _pip(self, *arguments: str) -> None:
        self._python("-m", "pip", *arguments, "--quiet", "--disable-pip-version-check")

    def _python(self, *arguments: str, **variables: str) -> str:
        return _run(self.python, *arguments, cwd=self.folder, **variables)


def _run(*command: str, cwd: Path | None = None, **variables: str) -> str:
    found = subprocess.run(command, cwd=cwd, env={**os.environ, **variables}, capture_output=True, text=True)
    if found.returncode:
        raise SystemExit(f"wheels: {' '.join(command)} failed\n{found.stdout[-8000:]}{found.stderr[-8000:]}")
    return found.stdout


def _only(folder: Path, pattern: str) -> Path:
    found = list(folder.glob(pattern))
    if len(found) != 1:
        raise SystemExit(f"wheels: expected one {pattern} in {folder}, found {[path.name for path in found]}")
    return found[0]


if __name__ == "__main__":
    main(sys.argv[1:] or TORCHES)
