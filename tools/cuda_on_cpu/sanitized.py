"""Run tests/cuda_on_cpu on kernels that watch their memory and their arithmetic: a part of `make proof`.

Builds the kernels with AddressSanitizer and UndefinedBehaviorSanitizer, proves that a write beyond a tensor is caught,
and runs pytest on them. Without GCC's sanitizers the tests run on the plain build, which is said. Further arguments are
pytest's.
"""

from __future__ import annotations

import os
import subprocess
import sys

from tools.cuda_on_cpu import building
from tools.sanitize import library

FOLDER = building.ROOT / "build" / "cuda_on_cpu_sanitized"
FAULT = """
import sys, torch
torch.ops.load_library(sys.argv[1])
level = torch.ones(1, 8, 9, 9)
distances = torch.empty(1, 9, 9)
distances.untyped_storage().resize_(4 * 80)  # which no check of a tensor's sizes sees
torch.ops.bkd_fast_cuda_on_cpu.cosine_distances([level], [level], [1.0], [1.0], 0.0, [8], [distances], [])
"""  # 81 distances are written


def main(arguments: list[str]) -> int:
    """Builds, checks that a fault is caught, then runs the tests."""
    if reason := building.why_not():
        print(f"cuda_on_cpu: not run: {reason}", file=sys.stderr)
        return 0
    libraries = [library(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so")]
    if not all(libraries):
        print("cuda_on_cpu: the compiler has no sanitizers, so memory is not watched", file=sys.stderr)
        return subprocess.run([sys.executable, "-m", "pytest", str(building.TESTS), *arguments]).returncode
    kernels = building.build(FOLDER, sanitize=True)
    environment = {
        **os.environ,
        "CUDA_ON_CPU": str(kernels),
        # The runtime has to be there before anything allocates; see tools/sanitize.py.
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:abort_on_error=1",
    }
    caught = subprocess.run(
        [sys.executable, "-c", FAULT, str(kernels)], env=environment, capture_output=True, text=True
    )
    if caught.returncode == 0 or "AddressSanitizer: heap-buffer-overflow" not in caught.stderr:
        print(f"{caught.stdout}{caught.stderr}cuda_on_cpu: a write outside a tensor was not caught", file=sys.stderr)
        return 1
    print("cuda_on_cpu: a write outside a tensor is caught", flush=True)
    # Without pytest's own capturing the sanitizers' words would be lost with the process.
    command = [sys.executable, "-m", "pytest", "--capture=sys", str(building.TESTS), *arguments]
    return subprocess.run(command, env=environment, cwd=building.ROOT).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
