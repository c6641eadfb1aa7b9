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


def commands(root: Path = ROOT, *, architecture: int = 800, sanitize: bool = False, optimize: str = "-O2") -> list[str]:
    """The shell commands that compile one file and that link, with ninja's ``$in`` and ``$out``; ``root`` has csrc."""
    from bkd_fast.extension import compiler

    include = Path(torch.__file__).parent / "include"
    flags = [
        optimize if not sanitize else f"-O1 {SANITIZERS}",
        "-g1 -std=c++17 -fPIC -Wall -Werror -Wno-unknown-pragmas -DBKD_ON_CPU",
        f"-DBKD_ARCH={architecture} -DTORCH_TARGET_VERSION=0x020a000000000000",
        f"-I{root / EMULATION.relative_to(ROOT)} -isystem {include}",
    ]
    link = f"-shared {SANITIZERS if sanitize else ''} -L{include.parent / 'lib'} -ltorch_cpu"
    return [
        f"{compiler()} -x c++ -MMD -MF $out.d {' '.join(flags)} -c $in -o $out",
        f"{compiler()} $in -o $out {link}",
    ]


def files() -> list[Path]:
    """What the library is compiled of."""
    found = [*sorted((ROOT / "csrc" / "cuda").glob("*.c*")), *sorted(EMULATION.glob("*.c*"))]
    return [file for file in found if file.suffix in (".cu", ".cpp")]


def build(folder: Path, *, architecture: int = 800, sanitize: bool = False) -> Path:
    """The library for a device of an architecture (750, 800), compiled anew where something has changed.

    Raises:
        RuntimeError: the compiler's message.
    """
    compiling, linking = commands(architecture=architecture, sanitize=sanitize)
    lines = [
        "rule compile",
        f"  command = {compiling}",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {linking}",
    ]
    objects = [f"{file.name}.o" for file in files()]
    lines += [f"build {name}: compile {file}" for name, file in zip(objects, files(), strict=True)]
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
