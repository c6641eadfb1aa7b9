"""Files for other run-times, and the run-times that read them.

``pt2``: torch.export's file. ``aoti``: compiled by AOTInductor for machines like this one, for C++ as well. ``onnx``:
standard operators alone. ``openvino``: the ONNX graph, converted (an .xml with a .bin beside it).
"""

from __future__ import annotations

import importlib
import io
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram

from bkd_fast.errors import BKDError
from bkd_fast.export.plain import plain
from bkd_fast.export.translations import DEFORM_OPSET, onnx_translations
from bkd_fast.extension import compiler
from bkd_fast.files import PREFIX, sync

INPUT, OUTPUTS = "images", ("scores", "anomaly_maps")
SUFFIXES = {"pt2": ".pt2", "aoti": ".aoti.pt2", "onnx": ".onnx", "openvino": ".xml"}
NEEDS = {"onnx": ("onnx", "onnxscript"), "openvino": ("onnx", "onnxscript", "openvino")}  # to write
RUNS = {"onnx": ("onnxruntime",), "openvino": ("openvino",)}  # to read
# Settings that a run-time needs to compute what the detector does: a CPU with bfloat16 would use that by default.
RUNTIME: dict[str, dict[str, str]] = {"openvino": {"INFERENCE_PRECISION_HINT": "f32"}}
OPSET = 18  # the first with resizing as PyTorch has it

Runner = Callable[[np.ndarray], Sequence[np.ndarray]]


def check_packages(format: str) -> None:
    """Raise a BKDError if what the format needs is not installed."""
    missing = [name for name in NEEDS.get(format, ()) if not _there(name)]
    if missing:
        raise BKDError(
            f"export to {format} needs {' and '.join(missing)}: install bkd_fast with its extra, "
            "pip install 'bkd_fast[export]'"
        )
    if format == "aoti" and compiler() is None:
        raise BKDError("export to aoti compiles C++, and there is no compiler: install one, or set CXX")


def write(program: ExportedProgram, format: str, path: Path, *, deform_conv: bool = False) -> None:
    """Write one format; a file that is there already is replaced when the new one is whole.

    Args:
        deform_conv: ``onnx`` only: DeformConv (opset 19) instead of GridSample.

    Raises:
        BKDError: a package that the format needs is not installed, or the file cannot be written.
    """
    check_packages(format)
    path.parent.mkdir(parents=True, exist_ok=True)
    plain_program = plain(program, deform_conv=deform_conv)
    with tempfile.TemporaryDirectory(prefix=PREFIX, dir=path.parent) as folder:
        made = Path(folder) / path.name
        if format == "pt2":
            buffer = io.BytesIO()  # torch's own writer ends the process if the disk is full
            torch.export.save(plain_program, buffer)
            made.write_bytes(buffer.getbuffer())
        elif format == "aoti":
            torch._inductor.aoti_compile_and_package(plain_program, package_path=str(made))
        else:
            onnx = made if format == "onnx" else made.with_suffix(".onnx")
            with _saving(path):
                _onnx(plain_program, deform_conv).save(onnx)
            if format == "openvino":
                _write_openvino(onnx, made)
        # The model last, so that one that is there is whole.
        files = sorted(Path(folder).iterdir(), key=lambda one: one == made)
        for file in files:
            sync(file)
        for file in files:
            shutil.move(file, path.parent / file.name)
        sync(path.parent)


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
    settings = {**RUNTIME["openvino"], **({"INFERENCE_NUM_THREADS": threads} if threads else {})}
    compiled = openvino.Core().compile_model(path, "CPU", settings)

    def run(images: np.ndarray) -> Sequence[np.ndarray]:
        found = compiled({INPUT: images})
        return [found[name] for name in OUTPUTS]

    return run


def _onnx(program: ExportedProgram, deform_conv: bool) -> Any:
    made = torch.onnx.export(
        program,
        (),
        dynamo=True,
        opset_version=DEFORM_OPSET if deform_conv else OPSET,
        input_names=[INPUT],
        output_names=list(OUTPUTS),
        custom_translation_table=onnx_translations() if deform_conv else {},
        verbose=False,
    )
    assert made is not None
    return made


def _write_openvino(onnx: Path, made: Path) -> None:
    """Convert an ONNX file in place, the settings of :data:`RUNTIME` in its runtime information.

    The CPU plugin takes no precision from there. For programs that do not set it either, each layer is marked as one
    that keeps float32, which leaves bfloat16 to the few layers that the plugin adds by itself.
    """
    openvino = importlib.import_module("openvino")
    model = openvino.convert_model(onnx)
    for name, value in RUNTIME["openvino"].items():
        model.set_rt_info(value, ["runtime_options", name])
    with _saving(made):
        openvino.save_model(model, made, compress_to_fp16=False)
        tree = ElementTree.parse(made)
        for layer in tree.iter("layer"):
            info = layer.find("rt_info")
            if info is None:
                info = ElementTree.Element("rt_info")
                layer.insert(0, info)
            ElementTree.SubElement(info, "attribute", name="precise", version="0")
        tree.write(made, encoding="utf-8", xml_declaration=True)
    onnx.unlink()


@contextmanager
def _saving(path: Path) -> Iterator[None]:
    """Report a file that cannot be written as such: the packages' writers raise whatever they like."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise BKDError(f"{path} could not be written ({error}): is there space, and may it be written?") from error


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
