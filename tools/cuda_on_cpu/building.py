"""Compiles csrc/cuda as C++ against the emulation, into a library of operators that run CUDA's kernels on the CPU."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import torch
from ninja import BIN_DIR

ROOT = Path(__file__).resolve().parent.parent.parent
TESTS = ROOT / "tests" / "cuda_on_cpu"
EMULATION = TESTS / "emulation"
FILE = "cuda_on_cpu.so"
SANITIZERS = "-fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all"


def why_not() -> str | None:
    """Why the kernels cannot run on this machine's CPU, or None."""
    from bkd_fast.extension import compiler

    if platform.machine().lower() not in ("x86_64", "amd64"):
        return "the emulation switches fibers with instructions of x86-64"
    return None if compiler() else "no C++ compiler"


def build(folder: Path, *, architecture: int = 800, sanitize: bool = False, sources: Path = ROOT / "csrc") -> Path:
    """The library for a device of an architecture (750, 800), compiled anew where something has changed.

    Raises:
        RuntimeError: the compiler's message.
    """
    from bkd_fast.extension import compiler

    include = Path(torch.__file__).parent / "include"
    flags = [
        "-O2" if not sanitize else f"-O1 {SANITIZERS}",
        "-g1 -std=c++17 -fPIC -Wall -Werror -Wno-unknown-pragmas -DBKD_ON_CPU",
        f"-DBKD_ARCH={architecture} -DTORCH_TARGET_VERSION=0x020a000000000000 -I{EMULATION} -isystem {include}",
    ]
    link = f"-shared {SANITIZERS if sanitize else ''} -L{include.parent / 'lib'} -ltorch_cpu"
    files = [*sorted((sources / "cuda").glob("*.c*")), *sorted(EMULATION.glob("*.c*"))]
    files = [file for file in files if file.suffix in (".cu", ".cpp")]
    lines = [
        "rule compile",
        f"  command = {compiler()} -x c++ -MMD -MF $out.d {' '.join(flags)} -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {compiler()} $in -o $out {link}",
    ]
    objects = [f"{file.name}.o" for file in files]
    lines += [f"build {name}: compile {file}" for name, file in zip(objects, files, strict=True)]
    lines.append(f"build {FILE}: link {' '.join(objects)}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text("\n".join(lines) + "\n", encoding="utf-8")
    ran = subprocess.run(
        [str(Path(BIN_DIR) / "ninja"), "-C", str(folder)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if ran.returncode:
        raise RuntimeError(f"the kernels do not compile as C++:\n{ran.stdout}")
    return folder / FILE


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
