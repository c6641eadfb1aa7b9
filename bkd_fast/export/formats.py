"""Files for other run-times, and the run-times that read them.

``pt2``: torch.export's file. ``aoti``: compiled by AOTInductor for machines like this one, for C++ as well. ``onnx``:
standard operators alone. ``openvino``: the ONNX graph, converted (an .xml with a .bin beside it).
"""

from __future__ import annotations

import importlib
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram

from bkd_fast.errors import BKDError
from bkd_fast.export.plain import plain
from bkd_fast.export.translations import DEFORM_OPSET, onnx_translations
from bkd_fast.extension import compiler

INPUT, OUTPUTS = "images", ("scores", "anomaly_maps")
SUFFIXES = {"pt2": ".pt2", "aoti": ".aoti.pt2", "onnx": ".onnx", "openvino": ".xml"}
NEEDS = {"onnx": ("onnx", "onnxscript"), "openvino": ("onnx", "onnxscript", "openvino")}  # to write
RUNS = {"onnx": ("onnxruntime",), "openvino": ("openvino",)}  # to read
OPSET = 18  # the first with resizing as PyTorch has it

Runner = Callable[[np.ndarray], Sequence[np.ndarray]]


def write(program: ExportedProgram, format: str, path: Path, *, deform_conv: bool = False) -> None:
    """Writes one format; a file that is there already is replaced when the new one is whole.

    Args:
        deform_conv: ``onnx`` only: DeformConv (opset 19) instead of GridSample.

    Raises:
        BKDError: a package that the format needs is not installed.
    """
    missing = [name for name in NEEDS.get(format, ()) if not _there(name)]
    if missing:
        raise BKDError(
            f"export to {format} needs {' and '.join(missing)}: install bkd_fast with its extra, "
            "pip install 'bkd_fast[export]'"
        )
    if format == "aoti" and compiler() is None:
        raise BKDError("export to aoti compiles C++, and there is no compiler: install one, or set CXX")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        if format == "pt2":
            torch.export.save(plain(program), made)
        elif format == "aoti":
            torch._inductor.aoti_compile_and_package(plain(program), package_path=str(made))
        else:
            onnx = made if format == "onnx" else made.with_suffix(".onnx")
            _write_onnx(program, onnx, deform_conv)
            if format == "openvino":
                openvino = importlib.import_module("openvino")
                openvino.save_model(openvino.convert_model(onnx), made, compress_to_fp16=False)
                onnx.unlink()
        # The description last, so that a file with its description is whole.
        for file in sorted(Path(folder).iterdir(), key=lambda one: one == made):
            shutil.move(file, path.parent / file.name)


def read(format: str, path: Path, threads: int | None = None) -> Runner | None:
    """The written file in its run-time, on the CPU; None where that is not installed.

    Args:
        threads: of ONNX Runtime and OpenVINO, which then wait without being busy (default: as the run-time likes it).
    """
    if not all(_there(name) for name in RUNS.get(format, ())):
        return None
    if format == "pt2":
        return _torch(torch.export.load(path).module())
    if format == "aoti":
        return _torch(torch._inductor.aoti_load_package(str(path)))
    if format == "onnx":
        onnxruntime = importlib.import_module("onnxruntime")
        options = onnxruntime.SessionOptions()
        if threads:
            options.intra_op_num_threads = threads
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return lambda images: session.run(list(OUTPUTS), {INPUT: images})
    openvino = importlib.import_module("openvino")
    settings = {"INFERENCE_PRECISION_HINT": "f32", **({"INFERENCE_NUM_THREADS": threads} if threads else {})}
    compiled = openvino.Core().compile_model(path, "CPU", settings)

    def run(images: np.ndarray) -> Sequence[np.ndarray]:
        found = compiled({INPUT: images})
        return [found[name] for name in OUTPUTS]

    return run


def _write_onnx(program: ExportedProgram, path: Path, deform_conv: bool) -> None:
    made = torch.onnx.export(
        plain(program, deform_conv=deform_conv),
        (),
        dynamo=True,
        opset_version=DEFORM_OPSET if deform_conv else OPSET,
        input_names=[INPUT],
        output_names=list(OUTPUTS),
        custom_translation_table=onnx_translations() if deform_conv else {},
        verbose=False,
    )
    assert made is not None
    made.save(path)


def _torch(module: Callable[..., Sequence[Tensor]]) -> Runner:
    def run(images: np.ndarray) -> Sequence[np.ndarray]:
        with torch.no_grad():
            return [found.numpy() for found in module(torch.from_numpy(images))]

    return run


def _there(package: str) -> bool:
    try:
        importlib.import_module(package)
    except ImportError:
        return False
    return True
