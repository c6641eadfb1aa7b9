"""The operator tests on native kernels that watch their memory: what `make sanitize` runs. It needs Linux and GCC.

Builds the extension with AddressSanitizer and UndefinedBehaviorSanitizer in a folder of its own, proves that a write
outside a tensor is caught, and runs pytest on that extension in place of the installed one, once for every instruction
set that the machine has.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "build" / "sanitize" / "_C.abi3.so"
# This file starts itself again under the sanitizers, for one of two things.
FAULT, TESTS = "--fault", "--tests"


def main(arguments: list[str]) -> int:
    """Builds, checks that a fault is caught, then runs the operator tests; ``arguments`` are further ones of pytest."""
    from bkd_fast import extension

    libraries = [library(name) for name in ("libasan.so", "libstdc++.so")]
    if not all(libraries):
        sys.exit("sanitize: the compiler has no libasan.so; install GCC, or name it with CXX=g++")
    extension.build(LIBRARY.parent, sanitize=True)
    environment = {
        **os.environ,
        # The runtime has to be there before anything allocates. It also intercepts what throws C++ exceptions, which it
        # finds only where that is loaded from the start, too; Python itself does not bring it.
        "LD_PRELOAD": " ".join(libraries),
        # Python and torch keep memory until the process ends: those are no leaks of the kernels. A process that aborts
        # shows Python's stack below the kernel's, and so the test.
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:abort_on_error=1",
    }

    def run(*arguments: str, **options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(Path(__file__).resolve()), *arguments]
        pipe = subprocess.PIPE if FAULT in arguments else None
        return subprocess.run(command, env={**environment, **options}, stdout=pipe, stderr=pipe, text=True)

    caught = run(FAULT)
    if caught.returncode == 0 or "AddressSanitizer: heap-buffer-overflow" not in caught.stderr:
        print(f"{caught.stdout}{caught.stderr}sanitize: a write outside a tensor was not caught", file=sys.stderr)
        return 1
    print("sanitize: a write outside a tensor is caught")
    for tier in caught.stdout.split():
        print(f"sanitize: {tier}", flush=True)
        if run(TESTS, str(ROOT / "tests" / "ops"), *arguments, BKD_FAST_SIMD=tier).returncode:
            print(f"sanitize: failed with BKD_FAST_SIMD={tier}", file=sys.stderr)
            return 1
    return 0


def library(name: str) -> str:
    """Return the path of a library of the compiler; empty without it."""
    from bkd_fast import extension

    command = [*shlex.split(extension.compiler() or ""), f"-print-file-name={name}"]
    path = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return path if Path(path).is_absolute() else ""


def load(library: Path = LIBRARY) -> None:
    """Loads an extension where the package would load its own; an error where it would take another."""
    import torch  # noqa: F401  which the extension is linked to

    spec = importlib.util.spec_from_file_location("bkd_fast._C", library)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[spec.name])
    importlib.import_module("bkd_fast.ops.native")
    loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "_C.abi3.so" in line}
    if loaded != {str(library)}:
        sys.exit(f"sanitize: {', '.join(sorted(loaded))} is loaded, expected only {library}")


def fault() -> None:
    """Print the instruction sets, then have a kernel write to a tensor whose memory is one number too small."""
    import torch

    kernels = torch.ops.bkd_fast_native
    print(kernels.cpu_tiers(), flush=True)
    level = torch.ones(1, 8, 9, 9)
    output = torch.empty(9 * 9)
    output.untyped_storage().resize_((9 * 9 - 1) * output.element_size())  # behind the tensor's back: checks see 9 * 9
    kernels.cosine_distances(0, [level], [level], [1.0], 0.0, output)


class NativeOnly:
    """Leaves out the tests on other backends, which have no kernels to watch."""

    @staticmethod
    def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if _parameters(item).get("each_backend", "native") == "native"]


def _parameters(item: pytest.Item) -> dict[str, object]:
    return item.callspec.params if hasattr(item, "callspec") else {}


if __name__ == "__main__":
    mode, *rest = sys.argv[1:] or [""]
    if mode == FAULT:
        load()
        fault()
    elif mode == TESTS:
        load()
        # Without pytest's own capturing the sanitizers' words would be lost with the process.
        sys.exit(pytest.main(["--capture=sys", *rest], plugins=[NativeOnly]))
    else:
        sys.exit(main(sys.argv[1:]))
