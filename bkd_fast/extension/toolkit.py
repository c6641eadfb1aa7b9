"""The CUDA toolkit: where it is, whether it fits torch, and for which devices it is to compile."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

LIST = "TORCH_CUDA_ARCH_LIST"
OLDEST = 75  # compute capability 7.5
OLDEST_SPECIFIC = 90  # that has code for its own architecture (9.0a) or family (10.0f) alone; torch takes those too
HEADERS = ("cuda_runtime.h", "cuda_fp16.h", "cuda_bf16.h")


class ToolkitError(RuntimeError):
    """Why CUDA kernels cannot be built here, and what to do."""


class Toolkit(NamedTuple):
    """A usable toolkit."""

    nvcc: Path
    include: Path
    libraries: Path


def find_toolkit() -> Toolkit:
    """The toolkit that CUDA_HOME or CUDA_PATH names, that nvcc on the PATH belongs to, or that /usr/local/cuda holds.

    Raises:
        ToolkitError: torch was built without CUDA, there is no toolkit, or one of another version or without headers.
    """
    import torch

    wanted = torch.version.cuda
    if wanted is None:
        raise ToolkitError("this torch was built without CUDA; install one with it")
    root = _root()
    nvcc = root / "bin" / "nvcc"
    if not nvcc.exists():
        raise ToolkitError(f"no CUDA toolkit in {root}; install CUDA {wanted}, or name its folder with CUDA_HOME")
    found = re.search(r"release (\d+)\.(\d+)", _output([str(nvcc), "--version"]))
    if not found or found[1] != wanted.split(".")[0]:
        version = f"{found[1]}.{found[2]}" if found else "of unknown version"
        raise ToolkitError(
            f"the CUDA toolkit in {root} is {version} and torch was built for {wanted}; install CUDA {wanted}"
        )
    include = next(
        (root / part for part in ("include", "targets/x86_64-linux/include") if (root / part).is_dir()), root
    )
    missing = [name for name in HEADERS if not (include / name).exists()]
    if missing:
        names = ", ".join(missing)
        raise ToolkitError(f"the CUDA toolkit in {root} has no {names}; install its cudart and headers too")
    for part in ("lib64", "lib", "targets/x86_64-linux/lib"):
        if (root / part / "libcudart.so").exists():
            return Toolkit(nvcc, include, root / part)
    raise ToolkitError(f"the CUDA toolkit in {root} has no libcudart.so; install its cudart")


def architectures(nvcc: Path) -> list[str]:
    """Return the compute capabilities to compile for, as ``80`` or ``90a``.

    ``80+PTX`` also keeps what newer devices compile for themselves.

    From TORCH_CUDA_ARCH_LIST; else of the GPUs of this machine; without any, those that torch itself was built for.

    Raises:
        ToolkitError: TORCH_CUDA_ARCH_LIST has one that is unknown to the kernels or the toolkit.
    """
    import torch

    known = set(re.findall(r"compute_(\d+)", _output([str(nvcc), "--list-gpu-arch"])))
    if given := os.environ.get(LIST, "").replace(";", " ").split():
        return [_checked(one, known) for one in given]
    if torch.cuda.is_available():
        found = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
        usable = sorted(major * 10 + minor for major, minor in found if major * 10 + minor >= OLDEST)
        if not usable:
            raise ToolkitError(f"no GPU of this machine has compute capability {OLDEST / 10} or newer")
        names = [str(one) for one in usable]
    else:
        flags = re.findall(r"sm_(\d+)", torch._C._cuda_getArchFlags() or "")
        names = sorted({one for one in flags if int(one) >= OLDEST and one in known}, key=int)
        if not names:
            raise ToolkitError(f"neither torch nor this machine says which GPUs to compile for; set {LIST}, say to 8.0")
    return [*names[:-1], f"{names[-1]}+PTX"]


def code_flags(names: Sequence[str]) -> list[str]:
    """nvcc's flags for :func:`architectures`."""
    flags = []
    for name in names:
        number = name.removesuffix("+PTX")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if name.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def _checked(name: str, known: set[str]) -> str:
    found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
    number = found[1] + found[2] if found else ""
    if not found or int(number) < OLDEST or number not in known or (found[3] and int(number) < OLDEST_SPECIFIC):
        usable = ", ".join(f"{one[:-1]}.{one[-1]}" for one in sorted(known, key=int) if int(one) >= OLDEST)
        raise ToolkitError(f"{LIST} has {name!r}, expected some of {usable}, or one of them with +PTX")
    return number + found[3] + (found[4] or "")


def _root() -> Path:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            return Path(os.environ[variable])
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return Path("/usr/local/cuda")
    # nvcc on the PATH may be a script that calls another one, which knows where it is.
    top = re.search(r"^#\$ TOP=(.+)$", _output([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull]), re.MULTILINE)
    return Path(top[1].strip()).resolve() if top else Path(nvcc).resolve().parent.parent


def _output(command: Sequence[str]) -> str:
    try:
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120).stdout
    except OSError as error:
        raise ToolkitError(f"{command[0]} could not be run ({error}); mend the CUDA toolkit") from error
