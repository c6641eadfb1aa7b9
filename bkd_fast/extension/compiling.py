"""Compilers, the flags of everything on torch's stable ABI, and ninja."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from pathlib import Path

TORCH_TARGET = "0x020a000000000000"  # torch 2.10, the oldest that can load the result
PYTHON_TARGET = "0x030a0000"  # Python 3.10
FLAGS = (
    "-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno", "-Wall", "-Wno-psabi",
)  # fmt: skip


def sources_folder() -> Path:
    """``csrc``: beside the package in a checkout, inside it where it is installed.

    Raises:
        FileNotFoundError: neither is there.
    """
    package = Path(__file__).resolve().parent.parent
    for folder in (package.parent / "csrc", package / "csrc"):
        if (folder / "library.cpp").exists():
            return folder
    raise FileNotFoundError(f"the C++ sources are neither in {package.parent / 'csrc'} nor in {package / 'csrc'}")


def compiler() -> str | None:
    """The C++ compiler: the environment variable CXX, or the first of c++, g++ and clang++; None without one."""
    chosen = os.environ.get("CXX")
    return chosen or next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)


def needed_compiler() -> str:
    """The C++ compiler.

    Raises:
        RuntimeError: there is none.
    """
    found = compiler()
    if found is None:
        raise RuntimeError("bkd_fast: there is no C++ compiler: install g++ or clang++, or name one with CXX")
    return found


def torch_folder() -> Path:
    """Where torch is installed."""
    import torch

    return Path(torch.__file__).parent


def stable_flags() -> list[str]:
    """What a file of bindings or CPU kernels is compiled with."""
    return [
        *FLAGS,
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
        f"-DPy_LIMITED_API={PYTHON_TARGET}",
        f"-isystem {escaped(torch_folder() / 'include')}",
        f"-isystem {escaped(sysconfig.get_paths()['include'])}",
    ]


def run_ninja(folder: Path, rules: Sequence[str], file: str) -> Path:
    """Writes the rules and makes ``file`` by them.

    Raises:
        RuntimeError: no ninja, or a compiler failed; its output is in the message.
    """
    try:
        from ninja import BIN_DIR  # a build requirement; not needed to use the package
    except ImportError as error:
        raise RuntimeError("bkd_fast: compiling needs ninja: pip install ninja") from error

    folder.mkdir(parents=True, exist_ok=True)
    name = f"{file}.ninja"
    (folder / name).write_text("\n".join(rules) + "\n", encoding="utf-8")
    command = [str(Path(BIN_DIR) / "ninja"), "-C", str(folder), "-f", name, file]
    ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if ran.returncode:
        raise RuntimeError(f"bkd_fast: compiling the native kernels failed:\n{ran.stdout}")
    return folder / file


def escaped(path: Path | str) -> str:
    """A path as ninja reads it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
