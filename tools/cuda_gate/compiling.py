"""Compile the CUDA kernels for every architecture and read their resources from the compiler's output."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent
ARCHITECTURES = ("75", "80", "86", "89", "90", "90a", "100", "120")
# The source and the kernels that only 9.0a has: they are empty elsewhere, and all others are those of 9.0.
SPECIFIC = {"90a": ("deform_conv.cu", "deform_conv_wgmma<")}
FLAGS = ("-O3", "-std=c++17", "--expt-relaxed-constexpr", "-cubin", "-Xptxas=-v")
CACHE = ROOT / "build" / "cuda_gate"


class Kernel(NamedTuple):
    """Resources of a kernel on one architecture; sizes in bytes."""

    name: str
    architecture: str
    registers: int
    shared: int
    stack: int
    spills: int
    threads: int
    instructions: tuple[str, ...]  # of SEEN
    issued: float = 0.0  # instructions per tensor-core instruction of the main loop; 0: there is none


# Threads of a block where they are not 256; tests/cuda_on_cpu compares them with the launches.
THREADS = {"select_matches": 128, "top_mean": 1024, "neighbor_residual": 640}
# Tensor-core products, fragment loads, asynchronous copies, additions to memory, and those of four floats at once;
# products by wgmma, bulk copies, and waits that leave a group of products in flight.
SEEN = {
    "HMMA": r"\bHMMA\b", "LDSM": r"\bLDSM\b", "LDGSTS": r"\bLDGSTS\b", "RED": r"\bREDG?\b",
    "RED.128": r"\bREDG?\.E\.(ADD\.F32x4|128\.ADD\.F32|ADD\.128)",
    "HGMMA": r"\bHGMMA\b", "UBLKCP": r"\bUBLKCP\b", "DEPBAR.1": r"\bWARPGROUP\.DEPBAR\.LE gsb0, 0x1\b",
}  # fmt: skip


def why_not() -> str | None:
    """Return why nothing can be compiled here, or None."""
    from bkd_fast.extension.toolkit import ToolkitError, find_toolkit

    try:
        find_toolkit()
    except ToolkitError as error:
        return str(error)
    return None if _tool("cuobjdump") else "there is no cuobjdump (triton brings one)"


def compiled(architectures: Sequence[str] = ARCHITECTURES) -> list[Kernel]:
    """Return all kernels, kept in build/cuda_gate until a source changes.

    Raises:
        RuntimeError: the compiler's message.
    """
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    jobs = [
        (source, architecture)
        for source in sources
        for architecture in architectures
        if architecture not in SPECIFIC or source.name == SPECIFIC[architecture][0]
    ]
    with ThreadPoolExecutor(2) as pool:
        return [kernel for kernels in pool.map(_compile, jobs) for kernel in kernels]


def _compile(job: tuple[Path, str]) -> list[Kernel]:
    from bkd_fast.extension.toolkit import find_toolkit

    source, architecture = job
    cache = CACHE / f"{source.stem}_{architecture}_{_digest(source)}.json"
    if cache.exists():
        kernels = [Kernel(*fields) for fields in json.loads(cache.read_text())]
        return [kernel._replace(instructions=tuple(kernel.instructions)) for kernel in kernels]
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:  # another process may do the same
        cubin = Path(folder) / "kernels.cubin"
        command = [str(find_toolkit().nvcc), *FLAGS, f"-arch=sm_{architecture}", "-o", str(cubin), str(source)]
        ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if ran.returncode:
            raise RuntimeError(f"{source.name} does not compile for sm_{architecture}:\n{ran.stdout}")
        command = [_tool("cuobjdump") or "", "-sass", str(cubin)]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        kernels = _read(ran.stdout, code, architecture)
        (Path(folder) / "kernels.json").write_text(json.dumps(kernels))
        os.replace(Path(folder) / "kernels.json", cache)
    return kernels


def _read(log: str, code: str, architecture: str) -> list[Kernel]:
    """Parse the log of ptxas -v and the disassembly."""
    if "wgmma.mma_async instructions are serialized" in log:
        raise RuntimeError(f"ptxas lets products wait for each other:\n{log}")
    bodies = dict(re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function : |\Z)", code, re.DOTALL))
    kernels = []
    for part in log.split("Compiling entry function ")[1:]:
        symbol = part.split("'")[1]

        def number(pattern: str, text: str = part) -> int:
            match = re.search(pattern, text)
            return int(match[1]) if match else 0

        name, body = short_name(symbol), bodies[symbol]
        home = next((own for own, (_, prefix) in SPECIFIC.items() if name.startswith(prefix)), None)
        if home != (architecture if architecture in SPECIFIC else None):
            continue
        kernels.append(
            Kernel(
                name,
                architecture,
                number(r"Used (\d+) registers"),
                number(r"(\d+) bytes smem") + dynamic_shared(name),
                number(r"(\d+) bytes stack frame"),
                number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
                THREADS.get(name.split("<")[0], 256),
                tuple(one for one, pattern in SEEN.items() if re.search(pattern, body)),
                issued(body),
            )
        )
    return kernels


def dynamic_shared(name: str) -> int:
    """Return the shared memory that a launch adds: the convolution's for nine taps (csrc/cuda/conv_policy.h)."""
    if tile := re.fullmatch(r"deform_conv_wgmma<\w+, (\d+)>", name):
        return 5 * 64 * int(tile[1]) + 128 + 9 * 32 * 128
    tile = re.fullmatch(r"deform_conv<\w+, \w+, (\d+), (\d+)>", name)
    if not tile:
        return 0
    rows, columns = int(tile[1]), int(tile[2])
    return 128 * (rows + columns) + 9 * 32 * rows


def issued(code: str) -> float:
    """Return the instructions of the main loop for each tensor-core instruction in it.

    One of wgmma counts as those of mma.sync that a warp would need for its 16 rows: one for eight columns. The main
    loop is the shortest that has such an instruction; a loop ends with a branch back to its start.
    """
    lines = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;/]*);", code)]
    loops = []
    for at, text in lines:
        target = re.search(r"\bBRA\b.*\b0x([0-9a-f]+)", text)
        if target and int(target[1], 16) <= at:
            body = [one for where, one in lines if int(target[1], 16) <= where <= at]
            products = sum("HMMA" in one for one in body)
            products += sum(int(columns) // 8 for one in body for columns in re.findall(r"HGMMA\.64x(\d+)x16", one))
            if products:
                loops.append((len(body), products))
    return round(min(loops)[0] / min(loops)[1], 2) if loops else 0.0


def short_name(symbol: str) -> str:
    """Return a mangled kernel's name in the tables, such as ``deform_conv<half, yes, 128, 128>``."""
    name = subprocess.run([shutil.which("c++filt") or "c++filt", symbol], capture_output=True, text=True).stdout.strip()
    name = re.sub(r"^void |bkd::|\(anonymous namespace\)::|\(bkd::.*$|\(long\)|\(int\)|\(bool\)", "", name)
    name = re.sub(r"_kernel\b", "", name).split("(")[0]
    for long, short in (("__half", "half"), ("__nv_bfloat16", "bfloat16"), ("true", "yes"), ("false", "no")):
        name = name.replace(long, short)
    return name


@functools.cache
def _digest(source: Path) -> str:
    digest = hashlib.sha256(" ".join(FLAGS).encode() + source.read_bytes() + Path(__file__).read_bytes())
    for path in sorted([*source.parent.glob("*.cuh"), *source.parent.glob("*.h"), *(ROOT / "csrc/common").glob("*")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def _tool(name: str) -> str | None:
    import triton

    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return str(bundled) if bundled.exists() else shutil.which(name)
