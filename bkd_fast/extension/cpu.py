"""The extension with the CPU kernels, ``bkd_fast._C``."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from .compiling import escaped, needed_compiler, run_ninja, sources_folder, stable_flags, torch_folder

FILE = "_C.abi3.so"
# Kernels (cpu/*.simd.cpp) are compiled once for each instruction set; which one runs is chosen at run time, so that
# nothing is compiled with -march=native.
TIERS: dict[str, tuple[str, ...]] = {"portable": ()}
if platform.machine().lower() in ("x86_64", "amd64"):
    TIERS["avx2"] = ("-mavx2", "-mfma", "-mf16c")
    TIERS["avx512"] = ("-mavx512f", "-mavx512vl", "-mavx512dq", "-mavx512bw", "-mfma", "-mf16c")
# Kernels of bfloat16 (cpu/*.bfloat.cpp) exist only for instruction sets that multiply it. There is none on other
# machines: their bindings are given floats.
BFLOAT_TIERS = {"avx512bf16": (*TIERS["avx512"], "-mavx512bf16")} if "avx512" in TIERS else {}
AMX = (*BFLOAT_TIERS.get("avx512bf16", ()), "-mamx-tile", "-mamx-bf16")


def build(folder: Path, *, sanitize: bool = False) -> Path:
    """Compiles and links the extension in ``folder``; returns the file.

    Args:
        sanitize: with AddressSanitizer and UndefinedBehaviorSanitizer.

    Raises:
        RuntimeError: no compiler, no ninja, or it failed; its output is in the message.
    """
    return run_ninja(folder, _rules(sanitize), FILE)


def just_in_time() -> Path:
    """The extension, compiled once for these sources and kept in the user's cache folder.

    Raises:
        RuntimeError: see :func:`build`.
    """
    digest = hashlib.sha256("\n".join(_rules(False)).encode())
    root = sources_folder()
    for path in sorted([*root.glob("*.cpp"), *root.glob("common/*"), *root.glob("cpu/*")]):
        digest.update(path.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bkd_fast" / digest.hexdigest()[:16]
    if not (cache / FILE).exists():
        cache.mkdir(parents=True, exist_ok=True)
        print(f"bkd_fast: compiling the native kernels once, into {cache}", file=sys.stderr)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            os.replace(build(Path(folder)), cache / FILE)  # another process that does the same does no harm
    return cache / FILE


def _rules(sanitize: bool) -> list[str]:
    found = needed_compiler()
    tiers = bfloat_tiers(found)
    extra = ["-DBKD_AMX"] if "amx" in tiers else []
    extra += ["-g", "-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"] if sanitize else []
    link = ["-shared", *extra, f"-L{escaped(torch_folder() / 'lib')}", "-ltorch_cpu"]
    if sys.platform == "darwin":
        link.append("-undefined dynamic_lookup")
    lines = [
        f"flags = {' '.join([*stable_flags(), *extra])}",
        "rule compile",
        f"  command = {found} -MMD -MF $out.d $flags $tier -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {found} $in -o $out {' '.join(link)}",
    ]
    objects = []
    for source, tier in _units(tiers):
        objects.append(f"{source.replace('/', '_')}{f'.{tier}' if tier else ''}.o")
        lines.append(f"build {objects[-1]}: compile {escaped(sources_folder() / source)}")
        lines.append(f"  tier = {' '.join((f'-DBKD_TIER={tier}', *{**TIERS, **tiers}[tier])) if tier else ''}")
    lines.append(f"build {FILE}: link {' '.join(objects)}")
    return lines


def bfloat_tiers(compiler: str) -> dict[str, tuple[str, ...]]:
    """The instruction sets that multiply bfloat16 and their flags; AMX on Linux, if the compiler has it."""
    if not BFLOAT_TIERS or sys.platform != "linux":
        return BFLOAT_TIERS
    command = [*shlex.split(compiler), *AMX, "-x", "c++", "-c", "-", "-o", os.devnull]
    code = 'void multiply() { __asm__ volatile("tdpbf16ps %tmm2, %tmm1, %tmm0"); }'
    try:
        known = not subprocess.run(command, input=code, capture_output=True, text=True).returncode
    except OSError:  # which the build that follows reports
        known = False
    return {**BFLOAT_TIERS, "amx": AMX} if known else BFLOAT_TIERS


def _units(bfloat: dict[str, tuple[str, ...]]) -> list[tuple[str, str | None]]:
    """Every source to compile, with the instruction set of a kernel or None."""
    units: list[tuple[str, str | None]] = [("library.cpp", None)]
    for path in sorted(sources_folder().glob("cpu/*.cpp")):
        tiers = {".simd": TIERS, ".bfloat": bfloat}.get(Path(path.stem).suffix, (None,))
        units += [(f"cpu/{path.name}", tier) for tier in tiers]
    return units
