"""The GPU tests under NVIDIA's compute-sanitizer: memcheck, racecheck, synccheck. Needs a GPU and the tool on the PATH.

``python -m tools.compute_sanitizer [TOOL]``: one tool, or all of them; further arguments are pytest's.
"""

import shutil
import subprocess
import sys
from pathlib import Path

TOOLS = ("memcheck", "racecheck", "synccheck")


def main(arguments: list[str]) -> int:
    """0 where no tool finds anything."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        print("compute-sanitizer is not on the PATH: it comes with the CUDA toolkit", file=sys.stderr)
        return 1
    tests = Path(__file__).resolve().parent.parent / "tests" / "ops" / "test_cuda.py"
    tools = (arguments.pop(0),) if arguments and arguments[0] in TOOLS else TOOLS
    for name in tools:
        print(f"compute-sanitizer: {name}", flush=True)
        command = [tool, "--tool", name, "--error-exitcode", "1", sys.executable, "-m", "pytest", "-q", "-x", tests]
        if subprocess.run([*command, "-k", "agree", *arguments]).returncode:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
