"""How the native extension is built: the one list of sources and flags, for the wheel and for the just-in-time build.

Everything is written against torch's stable ABI, so that one file serves every torch from 2.10 on. ninja compiles in
parallel and only what has changed. This module imports nothing of the package: setup.py loads it by its path.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

FILE = "_C.abi3.so"
TORCH_TARGET = "0x020a000000000000"  # torch 2.10, the oldest that can load the result
PYTHON_TARGET = "0x030a0000"  # Python 3.10

SOURCES = (
    "library.cpp",
    "cpu/dispatch.cpp",
    "cpu/deform_conv.cpp",
    "cpu/memory_attention.cpp",
    "cpu/anomaly_map.cpp",
)
# Every instruction set has a file and flags of its own, and is chosen when the program runs: never -march=native.
TIERS: dict[str, tuple[str, ...]] = {"cpu/tier_portable.cpp": ()}
if platform.machine().lower() in ("x86_64", "amd64"):
    TIERS["cpu/tier_avx2.cpp"] = ("-mavx2", "-mfma")
    TIERS["cpu/tier_avx512.cpp"] = ("-mavx512f", "-mavx512vl", "-mavx512dq", "-mavx512bw", "-mfma")
FLAGS = (
    "-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno", "-Wall", "-Wno-psabi",
)  # fmt: skip


def sources_folder() -> Path:
    """``csrc``: beside the package in a checkout, inside it where it is installed.

    Raises:
        FileNotFoundError: neither is there.
    """
    package = Path(__file__).resolve().parent
    for folder in (package.parent / "csrc", package / "csrc"):
        if (folder / "library.cpp").exists():
            return folder
    raise FileNotFoundError(f"the C++ sources are neither in {package.parent / 'csrc'} nor in {package / 'csrc'}")


def compiler() -> str | None:
    """The C++ compiler: the environment variable CXX, or the first of c++, g++ and clang++; None without one."""
    chosen = os.environ.get("CXX")
    return chosen or next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)


def build(folder: Path, *, sanitize: bool = False) -> Path:
    """Compiles and links the extension in ``folder``; returns the file.

    Args:
        sanitize: with AddressSanitizer and UndefinedBehaviorSanitizer.

    Raises:
        RuntimeError: no compiler, no ninja, or it failed; its output is in the message.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text(_rules(sanitize), encoding="utf-8")
    try:
        from ninja import BIN_DIR  # a build requirement; not needed to use the package
    except ImportError as error:
        raise RuntimeError("bkd_fast: compiling needs ninja: pip install ninja") from error

    ran = subprocess.run(
        [str(Path(BIN_DIR) / "ninja"), "-C", str(folder)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if ran.returncode:
        raise RuntimeError(f"bkd_fast: compiling the native kernels failed:\n{ran.stdout}")
    return folder / FILE


def just_in_time() -> Path:
    """The extension, compiled once for these sources and kept in the user's cache folder.

    Raises:
        RuntimeError: see :func:`build`.
    """
    digest = hashlib.sha256(_rules(False).encode())
    for path in sorted(sources_folder().rglob("*")):
        if path.is_file():
            digest.update(path.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bkd_fast" / digest.hexdigest()[:16]
    if not (cache / FILE).exists():
        cache.mkdir(parents=True, exist_ok=True)
        print(f"bkd_fast: compiling the native kernels once, into {cache}", file=sys.stderr)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            os.replace(build(Path(folder)), cache / FILE)  # another process that does the same does no harm
    return cache / FILE


def _rules(sanitize: bool) -> str:
    found = compiler()
    if found is None:
        raise RuntimeError("bkd_fast: there is no C++ compiler: install g++ or clang++, or name one with CXX")
    import torch

    torch_folder = Path(torch.__file__).parent
    extra = ["-g", "-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"] if sanitize else []
    flags = [
        *FLAGS,
        *extra,
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
        f"-DPy_LIMITED_API={PYTHON_TARGET}",
        f"-isystem {_escaped(torch_folder / 'include')}",
        f"-isystem {_escaped(sysconfig.get_paths()['include'])}",
    ]
    link = ["-shared", *extra, f"-L{_escaped(torch_folder / 'lib')}", "-ltorch_cpu"]
    if sys.platform == "darwin":
        link.append("-undefined dynamic_lookup")
    root = sources_folder()
    lines = [
        f"flags = {' '.join(flags)}",
        "rule compile",
        f"  command = {found} -MMD -MF $out.d $flags $tier -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {found} $in -o $out {' '.join(link)}",
    ]
    objects = []
    for source in (*SOURCES, *TIERS):
        objects.append(source.replace("/", "_") + ".o")
        lines.append(f"build {objects[-1]}: compile {_escaped(root / source)}")
        lines.append(f"  tier = {' '.join(TIERS.get(source, ()))}")
    lines.append(f"build {FILE}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def _escaped(path: Path | str) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
