"""Plants known faults in the CUDA kernels, one at a time, and sees that a test catches each: `make mutations`.

A fault is a text of csrc/cuda that occurs once, what stands there instead, and which tests may catch it. Further
arguments choose faults by a part of their names.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tools.cuda_on_cpu import building
from tools.cuda_on_cpu.faults import FAULTS, Fault

FOLDER = building.ROOT / "build" / "mutations"


def main(wanted: list[str]) -> int:
    """0 where every fault is caught."""
    chosen = [fault for fault in FAULTS if not wanted or any(part in fault.name for part in wanted)]
    missed = [fault.name for fault in chosen if not _caught(fault)]
    print(f"{len(chosen) - len(missed)} of {len(chosen)} faults are caught")
    if missed:
        print("not caught: " + "; ".join(missed), file=sys.stderr)
    return bool(missed)


def planted(fault: Fault, folder: Path) -> Path:
    """A copy of csrc with the fault; files that it does not change keep their time, and so their objects.

    Raises:
        ValueError: the text does not occur exactly once.
    """
    for original in (building.ROOT / "csrc").rglob("*"):
        copy = folder / original.relative_to(building.ROOT / "csrc")
        if original.is_file():
            text = original.read_text(encoding="utf-8")
            if original.name == fault.file:
                if text.count(fault.text) != 1:
                    raise ValueError(f"{fault.name}: {fault.text!r} occurs {text.count(fault.text)} times")
                text = text.replace(fault.text, fault.instead)
            if not copy.exists() or copy.read_text(encoding="utf-8") != text:
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_text(text, encoding="utf-8")
    return folder


def _caught(fault: Fault) -> bool:
    try:
        objects = FOLDER / f"objects_{fault.architecture}"
        library = building.build(objects, architecture=fault.architecture, sources=planted(fault, FOLDER / "csrc"))
    except RuntimeError as error:
        raise RuntimeError(f"{fault.name} does not compile, so that no test can catch it: {error}") from error
    # Under its own name: a process that has it open keeps it.
    own = shutil.copy(library, FOLDER / "faulty.so")
    command = [sys.executable, "-m", "pytest", "-q", "-x", str(building.TESTS), "-k", fault.tests]
    ran = subprocess.run(command, env={**os.environ, "CUDA_ON_CPU": str(own)}, capture_output=True, text=True)
    # 1: tests failed. Less than 0: the process was killed, as by a write to nowhere.
    caught = ran.returncode == 1 or ran.returncode < 0
    by = next((line for line in ran.stdout.splitlines() if line.startswith("FAILED")), f"exit {ran.returncode}")
    print(f"{'caught' if caught else 'NOT CAUGHT'}: {fault.name} ({by.split('::')[-1].split(' - ')[0]})", flush=True)
    return caught


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
