"""The extension with the CUDA kernels, ``bkd_fast._cuda``: kernels by nvcc, bindings by the C++ compiler."""

from __future__ import annotations

import os
from pathlib import Path

from .compiling import escaped, needed_compiler, run_ninja, sources_folder, stable_flags, torch_folder
from .toolkit import Toolkit, ToolkitError, architectures, code_flags, find_toolkit

CUDA_FILE = "_cuda.abi3.so"
VARIABLE = "BKD_FAST_CUDA"
# -lineinfo costs nothing when kernels run, and lets profilers point at lines.
NVCC_FLAGS = ("-O3", "-std=c++17", "-lineinfo", "-Xcompiler=-fPIC,-fvisibility=hidden", "--expt-relaxed-constexpr")


def wanted_toolkit() -> tuple[Toolkit | None, str]:
    """The toolkit to build CUDA kernels with, or None and the reason, by BKD_FAST_CUDA (auto, 0, 1; auto without it).

    Raises:
        RuntimeError: BKD_FAST_CUDA is something else; or 1, and nothing fits.
    """
    wanted = os.environ.get(VARIABLE) or "auto"
    if wanted not in ("auto", "0", "1"):
        raise RuntimeError(f"bkd_fast: {VARIABLE} is {wanted!r}, expected auto, 0 or 1")
    if wanted == "0":
        return None, f"{VARIABLE}=0"
    try:
        toolkit = find_toolkit()
        architectures(toolkit.nvcc)
    except (ToolkitError, ImportError) as error:
        if wanted == "1":
            raise RuntimeError(f"bkd_fast: {VARIABLE}=1, and CUDA kernels cannot be built: {error}") from error
        return None, str(error)
    return toolkit, ""


def build_cuda(folder: Path, toolkit: Toolkit) -> Path:
    """Compiles and links the extension in ``folder``; returns the file.

    Raises:
        RuntimeError: no compiler, no ninja, or it failed; its output is in the message.
    """
    root = sources_folder() / "cuda"
    compiler = needed_compiler()
    # torch has loaded the CUDA runtime of its own before the extension looks for it.
    link = [
        f"-L{escaped(torch_folder() / 'lib')}",
        "-ltorch_cpu",
        "-ltorch_cuda",
        f"-L{escaped(toolkit.libraries)}",
        "-lcudart",
    ]
    codes = " ".join([*NVCC_FLAGS, *code_flags(architectures(toolkit.nvcc))])
    rules = [
        f"flags = {' '.join([*stable_flags(), '-DUSE_CUDA', f'-isystem {escaped(toolkit.include)}'])}",
        "rule kernels",
        f"  command = {escaped(toolkit.nvcc)} -ccbin {compiler} -MD -MF $out.d {codes} -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule bindings",
        f"  command = {compiler} -MMD -MF $out.d $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {compiler} $in -o $out -shared {' '.join(link)}",
    ]
    objects = []
    for source in sorted([*root.glob("*.cu"), *root.glob("*.cpp")]):
        objects.append(f"cuda_{source.name}.o")
        rules.append(f"build {objects[-1]}: {'kernels' if source.suffix == '.cu' else 'bindings'} {escaped(source)}")
    rules.append(f"build {CUDA_FILE}: link {' '.join(objects)}")
    return run_ninja(folder, rules, CUDA_FILE)
