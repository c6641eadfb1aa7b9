"""Plants known faults in the CUDA kernels, one at a time, and sees that a test catches each: `make mutations`.

A fault is a text of csrc/cuda that occurs once, what stands there instead, the file that is compiled with it, and which
tests may catch it. Further arguments choose faults by a part of their names.

The kernels are compiled once; for a fault only one file is, while the tests of the fault before it run. The tests run
in forks of this process, which has imported what they need. In the end all tests that caught a fault must pass without
one.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tools.cuda_on_cpu import building
from tools.cuda_on_cpu.faults import FAULTS, Fault

FOLDER = building.ROOT / "build" / "mutations"
AHEAD = 2  # faults that are compiled at the same time
SECONDS = 600  # of processor time for the tests of a fault, which may never end


class Outcome(NamedTuple):
    """How the tests of a fault ended: ``caught``, ``not caught`` or ``does not compile``; which test, or why."""

    state: str
    by: str


def main(wanted: list[str]) -> int:
    """0 where every fault is caught, by tests that pass without it."""
    if reason := building.why_not():
        print(f"mutations: not run: {reason}", file=sys.stderr)
        return 1
    start = time.monotonic()
    chosen = [fault for fault in FAULTS if not wanted or any(part in fault.name for part in wanted)]
    if broken := [message for fault in chosen if (message := inapplicable(fault))]:
        print("\n".join(broken), file=sys.stderr)
        return 1
    for architecture in sorted({fault.architecture for fault in chosen}):
        building.build(_objects(architecture), architecture=architecture)
    _import_what_tests_need()
    catching: set[tuple[int, str]] = set()
    missed = []
    for fault, outcome in _outcomes(chosen):
        print(f"{outcome.state}: {fault.name} ({outcome.by})", flush=True)
        if outcome.state != "caught":
            missed.append(fault.name)
        elif "::" in outcome.by:
            catching.add((fault.architecture, outcome.by))
    minutes = (time.monotonic() - start) / 60
    print(f"{len(chosen) - len(missed)} of {len(chosen)} faults are caught, in {minutes:.0f} minutes")
    if missed:
        print("not caught: " + "; ".join(missed), file=sys.stderr)
    return bool(missed) | _fail_without_fault(catching)


def inapplicable(fault: Fault) -> str | None:
    """Why a fault cannot be planted, or None."""
    found = [path for path in (building.ROOT / "csrc").rglob("*") if path.name == fault.file]
    count = found[0].read_text(encoding="utf-8").count(fault.text) if found else 0
    if count != 1:
        return f"{fault.name}: {fault.text!r} occurs {count} times in {fault.file}"
    if fault.compiled not in [file.name for file in building.files()]:
        return f"{fault.name}: {fault.compiled} is not compiled"
    return None


def planted(fault: Fault, root: Path) -> Path:
    """A copy of the kernels and the emulation below ``root``, with the fault. Returns the file to compile."""
    for folder in (building.ROOT / "csrc", building.EMULATION):
        shutil.copytree(folder, root / folder.relative_to(building.ROOT))
    faulty = next(path for path in (root / "csrc").rglob("*") if path.name == fault.file)
    faulty.write_text(faulty.read_text(encoding="utf-8").replace(fault.text, fault.instead), encoding="utf-8")
    (file,) = [file for file in building.files() if file.name == fault.compiled]
    return root / file.relative_to(building.ROOT)


def _objects(architecture: int) -> Path:
    return FOLDER / f"objects_{architecture}"


def _start_build(fault: Fault, folder: Path) -> subprocess.Popen[str]:
    """Start to compile the faulty file, and to link it with the objects of the others, into ``faulty.so``."""
    shutil.rmtree(folder, ignore_errors=True)
    source = planted(fault, folder)
    compiling, linking = building.commands(folder, architecture=fault.architecture, optimize="-O1")
    others = [f"{file.name}.o" for file in building.files() if file.name != fault.compiled]
    objects = " ".join(str(_objects(fault.architecture) / name) for name in others)
    command = " && ".join(
        (
            compiling.replace("$in", str(source)).replace("$out", "faulty.o"),
            linking.replace("$in", f"faulty.o {objects}").replace("$out", "faulty.so"),
        )
    )
    return subprocess.Popen(
        command, shell=True, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def _outcomes(faults: Sequence[Fault]) -> Iterator[tuple[Fault, Outcome]]:
    waiting: list[tuple[Fault, Path, subprocess.Popen[str]]] = []
    left = list(enumerate(faults))
    while left or waiting:
        while left and len(waiting) < AHEAD:
            index, fault = left.pop(0)
            folder = FOLDER / f"fault_{index}"
            waiting.append((fault, folder, _start_build(fault, folder)))
        fault, folder, build = waiting.pop(0)
        output, _ = build.communicate()
        if build.returncode:
            yield fault, Outcome("does not compile", output)
        else:
            # Most faults fail one of test_operators.py, whose tests are quick.
            tests = sorted(map(str, building.TESTS.glob("test_*.py")), key=lambda path: "test_operators" not in path)
            yield fault, run_tests(folder / "faulty.so", folder / "log", [*tests, "-k", fault.tests])
        shutil.rmtree(folder)


def run_tests(library: Path, log: Path, arguments: Sequence[str]) -> Outcome:
    """Run pytest on a library in a fork of this process, up to the first failure."""
    child = os.fork()
    if not child:
        status = 70
        with contextlib.suppress(BaseException):
            status = _test(library, log, arguments)
        os._exit(status)  # leaves no time for what runs at an exit
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    if code == 1:
        failed = (line.removeprefix("FAILED ").split(" - ")[0] for line in lines if line.startswith("FAILED "))
        return Outcome("caught", next(failed, "an error"))
    if code == -signal.SIGXCPU:
        return Outcome("not caught", f"the tests did not end in {SECONDS} s")
    if code < 0:  # as by a write to nowhere
        return Outcome("caught", f"the process was killed by {signal.Signals(-code).name}")
    return Outcome("not caught", "all tests pass" if code == 0 else f"pytest exits with {code}: {lines[-1:]}")


def _test(library: Path, log: Path, arguments: Sequence[str]) -> int:
    import pytest

    os.environ["CUDA_ON_CPU"] = str(library)
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 10))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1), os.dup2(file, 2)
    os.chdir(building.ROOT)
    return int(pytest.main(["-q", "-x", "--tb=no", "-rfE", "-p", "no:cacheprovider", *arguments]))


def _import_what_tests_need() -> None:
    """So that forks need not import it."""
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401
    import torch

    import bkd_fast.ops  # noqa: F401

    torch.set_num_threads(1)  # threads do not survive a fork


def _fail_without_fault(catching: set[tuple[int, str]]) -> bool:
    """Whether a test that caught a fault fails without one too."""
    failed = False
    for architecture in sorted({architecture for architecture, _ in catching}):
        tests = sorted(test for own, test in catching if own == architecture)
        log = FOLDER / "log"
        outcome = run_tests(_objects(architecture) / building.FILE, log, tests)
        if outcome.by != "all tests pass":
            print(f"without a fault: {outcome.by}\n{log.read_text(encoding='utf-8')}", file=sys.stderr)
            failed = True
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
