"""Compiles every Triton kernel in every configuration and type, as launches of the operators would, without a GPU."""

from __future__ import annotations

import functools
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
SUPPORT = ROOT / "tests" / "support"
sys.path.insert(0, str(SUPPORT))  # for cases, in processes that pytest did not start
ARCHITECTURES = (80, 90, 120)
CACHE = ROOT / "build" / "triton_gate"
TENSOR_CORES = r"\b(HMMA|HGMMA)"
SPILLS = r"\b(STL|LDL)\b"  # stores to and loads from a thread's own memory
SPLIT = ", split depth"  # behind the type
TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "tf32": torch.float32, "float32": torch.float32}


class Kernel(NamedTuple):
    """What one kernel needs in one configuration on one architecture; sizes in bytes."""

    name: str
    kind: str  # type, and what is special about the launch
    config: str
    architecture: int
    registers: int
    shared: int
    spills: int  # instructions that put registers aside, or fetch them
    tensor_cores: bool


def why_not() -> str | None:
    """Why nothing can be compiled here, or None."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return str(error)
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1"
    return None if _tool() else "there is no cuobjdump (Triton brings one)"


def compiled() -> list[Kernel]:
    """All kernels, kept in build/triton_gate until a source or Triton changes.

    Raises:
        triton.CompilationError: a kernel does not compile.
    """
    missing = [architecture for architecture in ARCHITECTURES if not _kept(architecture).exists()]
    if missing:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(2, mp_context=context) as pool:
            list(pool.map(_compile, missing))
    return [
        Kernel(*fields)
        for architecture in ARCHITECTURES
        for fields in json.loads(_kept(architecture).read_text(encoding="utf-8"))
    ]


def space() -> Iterator[tuple[str, str, str]]:
    """Kernel, kind of arithmetic and configuration, of everything that tuning may choose."""
    for tuned in _tuned():
        for kind, configs in tuned.kinds.items():
            for one in configs:
                yield tuned.kernel.__name__, kind, label(one)


def label(config: Any) -> str:
    """``64x64x32, 4 warps, 2 stages``."""
    blocks = "x".join(str(size) for size in config.kwargs.values())
    return f"{blocks}, {config.num_warps} warps, {config.num_stages} stages"


def kind_of(kind: str) -> str:
    """Which set of configurations a kind of :class:`Kernel` takes, where a kernel has several."""
    kind = kind.removesuffix(SPLIT)
    return {"tf32": "tf32", "float32": "ieee", "float16, deterministic": "exact"}.get(kind, "half")


def _compile(architecture: int) -> None:
    """For one architecture, to its file."""
    from tools.triton_gate.target import compiling_for

    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        found: dict[tuple[str, str, str], Kernel] = {}
        with compiling_for(architecture):
            for kind, tuner, arguments, keywords in _launches():
                tuner.nargs = dict(zip(tuner.arg_names, arguments, strict=False))
                configs = tuner.prune_configs(keywords)
                # float16 differs from bfloat16 by the type of an instruction: its first configuration will do.
                for one in configs[:1] if kind == "float16" else configs:
                    name = tuner.base_fn.__name__
                    key = (name, kind + SPLIT if keywords.get("SPLIT") else kind, label(one))
                    if key not in found:
                        made = tuner.fn.warmup(*arguments, grid=(1,), **keywords, **one.all_kwargs())
                        found[key] = Kernel(*key, architecture, *_read(made.asm["cubin"], made.metadata.shared, folder))
        written = Path(folder) / "kernels.json"
        written.write_text(json.dumps(list(found.values())), encoding="utf-8")
        os.replace(written, _kept(architecture))


def _launches() -> Iterator[tuple[str, Any, tuple[Any, ...], dict[str, Any]]]:
    """Kind, tuner and arguments of every launch that a set of calls makes.

    Sizes that are multiples of 16, as models have them, in every type; and sizes that are none, and deterministic sums,
    for each of which Triton makes other code.
    """
    import cases

    for name, dtype in TYPES.items():
        switch = "tf32" if name == "tf32" else "ieee"
        torch.backends.cudnn.conv.fp32_precision = torch.backends.cuda.matmul.fp32_precision = switch
        cases.LEVELS = ((2, 64, 16, 16), (2, 128, 8, 8), (2, 256, 4, 4))
        calls = [
            cases.conv(1, 64, 256, (16, 16)),
            cases.conv(1, 64, 256, (8, 8)),  # so few pixels that the depth is split
            cases.gather(16, 64),
            cases.attention(64, 512, 64),
            cases.anomaly((64, 64), last=True),
            cases.loss("flat", True),
            cases.loss("pixel", True),
            cases.match(channels=64, size=(16, 16)),
            *_samples(),
            *_samples_without_gradient(),
        ]
        for launch in _recorded(calls, dtype):
            yield name, *launch
    cases.LEVELS = ((2, 19, 9, 7), (2, 40, 5, 5), (2, 3, 1, 2))
    odd = [
        cases.conv(outputs=133),
        cases.conv(channels=35, outputs=133),  # deep enough to be split
        cases.gather(),
        cases.attention(),
        cases.anomaly(),
        cases.loss("pixel", False),
        cases.match(),
    ]
    for launch in _recorded(odd, torch.float16):
        yield "float16, odd sizes", *launch
    torch.use_deterministic_algorithms(True, warn_only=True)
    for launch in _recorded([cases.conv(1, 64, 64, (16, 16)), cases.gather(16, 64)], torch.float16):
        if launch[2].get("EXACT"):
            yield "float16, deterministic", *launch
    torch.use_deterministic_algorithms(False)


def _samples() -> list[Any]:
    """One call of every operator with a gradient, so that the kernels of a new one are compiled too."""
    sys.path.insert(0, str(SUPPORT.parent / "ops"))
    import test_operators as ops

    arguments = {name: ops.sample(name) for name in ops.WITH_GRADIENT}
    return [(ops.of_tensors(name, given), ops.tensors(given)) for name, given in arguments.items()]


def _samples_without_gradient() -> list[Callable[[torch.dtype], Any]]:
    import test_operators as ops

    def call(name: str, dtype: torch.dtype) -> Any:
        arguments = [
            value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for value in ops.sample(name)
        ]
        return ops.overload(name)(*arguments)

    return [functools.partial(call, name) for name in ops.NAMES if name not in ops.WITH_GRADIENT]


def _recorded(calls: list[Any], dtype: torch.dtype) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """Launches of the calls and of their gradients; nothing is computed."""
    import cases

    from bkd_fast.ops import backend, triton_common

    found = []

    class Recorder:
        def __init__(self, tuner: Any) -> None:
            self.tuner = tuner

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda *arguments, **keywords: found.append((self.tuner, arguments, keywords))

    triton_common.DEVICES["cpu"] = triton_common.DEVICES["cuda"]
    for module in _modules():
        if hasattr(module, "wrap_triton"):
            module.wrap_triton = Recorder
    for call in calls:
        if callable(call):
            with backend("triton"):
                call(dtype)
            continue
        run = cases.matched if isinstance(call, cases.Match) else cases.results
        run(call, "triton", dtype)
    return found


def _modules() -> list[Any]:
    from bkd_fast.ops.backend import operators, usable

    for name in operators():
        usable(name, "cuda")  # which imports its kernels
    return [module for name, module in sorted(sys.modules.items()) if name.startswith("bkd_fast.ops.")]


def _tuned() -> list[Any]:
    from bkd_fast.ops.triton_common import Tuned

    return [value for module in _modules() for value in vars(module).values() if isinstance(value, Tuned)]


def _read(cubin: bytes, shared: int, folder: str) -> tuple[int, int, int, bool]:
    """Registers, shared memory, spills, and whether there are products on tensor cores."""
    path = Path(folder) / "kernel.cubin"
    path.write_bytes(cubin)
    command = [_tool() or "", "-res-usage", "-sass", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+)", text)
    assert usage, text[:500]
    return int(usage[1]), shared, len(re.findall(SPILLS, text)), re.search(TENSOR_CORES, text) is not None


def _kept(architecture: int) -> Path:
    return CACHE / f"{architecture}_{_digest()}.json"


@functools.cache
def _digest() -> str:
    import triton

    digest = hashlib.sha256(f"{triton.__version__} {torch.__version__}".encode())
    for path in [
        *sorted((ROOT / "bkd_fast" / "ops").rglob("*.py")),
        SUPPORT / "cases.py",
        *sorted((ROOT / "tests/ops/samples").glob("*.py")),
        Path(__file__),
    ]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def _tool() -> str | None:
    import triton

    brought = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(brought) if brought.exists() else shutil.which("cuobjdump")
