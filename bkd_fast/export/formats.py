"""Files for other run-times, and the run-times that read them.

``pt2``: torch.export's file. ``aoti``: compiled by AOTInductor for machines like this one, for C++ as well. ``onnx``:
standard operators alone. ``openvino``: the ONNX graph, converted (an .xml with a .bin beside it). Each holds its
settings (:mod:`bkd_fast.export.settings`): as metadata_props in ONNX, as rt_info/bkd_fast in OpenVINO, as the extra
file ``bkd_fast.json`` of torch.export, and as metadata of an AOTInductor package.
"""

from __future__ import annotations

import importlib
import io
import json
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram

from bkd_fast.errors import BKDError
from bkd_fast.export.plain import plain
from bkd_fast.export.settings import INPUT, OUTPUTS, RUNTIME
from bkd_fast.export.translations import DEFORM_OPSET, onnx_translations
from bkd_fast.extension import compiler
from bkd_fast.files import PREFIX, sync

SUFFIXES = {"pt2": ".pt2", "aoti": ".aoti.pt2", "onnx": ".onnx", "openvino": ".xml"}
NEEDS = {"onnx": ("onnx", "onnxscript"), "openvino": ("onnx", "onnxscript", "openvino")}  # to write
RUNS = {"onnx": ("onnxruntime",), "openvino": ("openvino",)}  # to read
OPSET = 18  # the first with resizing as PyTorch has it
NAMESPACE = "bkd_fast"  # of the settings, where a file needs one

Predict = Callable[[np.ndarray], Sequence[np.ndarray]]


@dataclass(frozen=True)
class Runner:
    """An exported model in its run-time: called with images (N, 3, H, W), returns scores (N,) and maps (N, H, W).

    ``metadata``: what the file says of itself, by name.
    """

    predict: Predict
    metadata: Mapping[str, str]

    def __call__(self, images: np.ndarray) -> Sequence[np.ndarray]:
        """Return what the model gives for images."""
        return self.predict(images)


def check_packages(format: str, *, int8: bool = False) -> None:
    """Raise a BKDError if what the format needs is not installed."""
    missing = [name for name in NEEDS.get(format, ()) if not _there(name)]
    if int8 and not _there("nncf"):
        raise BKDError(
            f"int8 needs {' and '.join([*missing, 'nncf'])}: install bkd_fast with its extra, "
            "pip install 'bkd_fast[int8]'"
        )
    if missing:
        raise BKDError(
            f"export to {format} needs {' and '.join(missing)}: install bkd_fast with its extra, "
            "pip install 'bkd_fast[export]'"
        )
    if format == "aoti" and compiler() is None:
        raise BKDError("export to aoti compiles C++, and there is no compiler: install one, or set CXX")


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Yield a path of the same name in a temporary folder; what is written there replaces what is beside ``path``.

    Nothing is replaced, and nothing left behind, if the block ends with an error. The file ``path`` itself comes last,
    so that one that is there is whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=PREFIX, dir=path.parent) as folder:
        made = Path(folder) / path.name
        yield made
        files = sorted(Path(folder).iterdir(), key=lambda one: one == made)
        for file in files:
            sync(file)
        for file in files:
            shutil.move(file, path.parent / file.name)
        sync(path.parent)


def write(
    program: ExportedProgram,
    format: str,
    path: Path,
    *,
    deform_conv: bool = False,
    metadata: Mapping[str, str] | None = None,
    convert: Callable[[Any], Any] | None = None,
) -> None:
    """Write one format into a folder that is there; see :func:`staged` for one that others read.

    Args:
        deform_conv: ``onnx`` only: DeformConv (opset 19) instead of GridSample.
        metadata: what the file says of itself, by name.
        convert: ``openvino`` only: what is made of the model before it is saved.

    Raises:
        BKDError: a package that the format needs is not installed, or the file cannot be written.
    """
    check_packages(format)
    metadata = dict(metadata or {})
    plain_program = plain(program, deform_conv=deform_conv)
    if format == "pt2":
        buffer = io.BytesIO()  # torch's own writer ends the process if the disk is full
        torch.export.save(plain_program, buffer, extra_files={f"{NAMESPACE}.json": json.dumps(metadata)})
        path.write_bytes(buffer.getbuffer())
    elif format == "aoti":
        configs = {"aot_inductor.metadata": metadata}
        torch._inductor.aoti_compile_and_package(plain_program, package_path=str(path), inductor_configs=configs)
    else:
        onnx = path if format == "onnx" else path.with_suffix(".onnx")
        made = _onnx(plain_program, deform_conv)
        made.model.metadata_props.update(metadata)
        with saving(path):
            made.save(onnx)
        if format == "openvino":
            _write_openvino(onnx, path, metadata, convert)


def format_of(path: Path) -> str:
    """Return the format of an exported file, from its suffix and, of a package of torch's, from what is in it.

    Raises:
        BKDError: no such file, or of another kind.
    """
    if not path.is_file():
        raise BKDError(f"there is no file {path}: expected a model that `bkd-fast export` wrote")
    suffixes = {".onnx": "onnx", ".xml": "openvino"}
    if path.suffix in suffixes:
        return suffixes[path.suffix]
    if path.suffix == ".pt2" and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as package:
            return "aoti" if any("aotinductor/" in name for name in package.namelist()) else "pt2"
    raise BKDError(f"{path} is not an exported model: expected an .onnx, .xml or .pt2 file of `bkd-fast export`")


def read(format: str, path: Path, threads: int | None = None) -> Runner | None:
    """The written file in its run-time, on the CPU; None where that is not installed.

    Args:
        threads: of ONNX Runtime and OpenVINO, which then wait without being busy (default: as the run-time likes it).
    """
    if not all(_there(name) for name in RUNS.get(format, ())):
        return None
    if format == "pt2":
        extra = {f"{NAMESPACE}.json": "{}"}
        module = torch.export.load(path, extra_files=extra).module()
        return Runner(_torch(module), json.loads(extra[f"{NAMESPACE}.json"]))
    if format == "aoti":
        package = torch._inductor.aoti_load_package(str(path))
        own = {name: value for name, value in package.get_metadata().items() if not name.startswith("AOTI_")}
        return Runner(_torch(package), own)
    if format == "onnx":
        onnxruntime = importlib.import_module("onnxruntime")
        options = onnxruntime.SessionOptions()
        if threads:
            options.intra_op_num_threads = threads
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return Runner(
            lambda images: session.run(list(OUTPUTS), {INPUT: images}), session.get_modelmeta().custom_metadata_map
        )
    openvino = importlib.import_module("openvino")
    settings = {**RUNTIME["openvino"], **({"INFERENCE_NUM_THREADS": threads} if threads else {})}
    core = openvino.Core()
    model = core.read_model(path)
    compiled = core.compile_model(model, "CPU", settings)

    def run(images: np.ndarray) -> Sequence[np.ndarray]:
        outputs = compiled({INPUT: images})
        return [outputs[name] for name in OUTPUTS]

    metadata: Any = model.rt_info[NAMESPACE] if model.has_rt_info(NAMESPACE) else {}
    return Runner(run, {name: value.astype(str) for name, value in metadata.items()})


@contextmanager
def saving(path: Path) -> Iterator[None]:
    """Report a file that cannot be written as such: the packages' writers raise whatever they like."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise BKDError(f"{path} could not be written ({error}): is there space, and may it be written?") from error


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


def _write_openvino(onnx: Path, made: Path, metadata: Mapping[str, str], convert: Callable[[Any], Any] | None) -> None:
    """Convert an ONNX file in place, metadata and the settings of :data:`RUNTIME` in its runtime information.

    The CPU plugin takes no precision from there. For programs that do not set it either, each layer is marked as one
    that keeps float32, which leaves bfloat16 to the few layers that the plugin adds by itself.
    """
    openvino = importlib.import_module("openvino")
    model = openvino.convert_model(onnx)
    if convert is not None:
        model = convert(model)
    for name, value in metadata.items():
        model.set_rt_info(value, [NAMESPACE, name])
    for name, value in RUNTIME["openvino"].items():
        model.set_rt_info(value, ["runtime_options", name])
    with saving(made):
        openvino.save_model(model, made, compress_to_fp16=False)
        keep_float32(made)
    onnx.unlink()


def keep_float32(path: Path) -> None:
    """Mark each layer of an OpenVINO model as one that keeps float32, where the CPU would take bfloat16."""
    tree = ElementTree.parse(path)
    for layer in tree.iter("layer"):
        info = layer.find("rt_info")
        if info is None:
            info = ElementTree.Element("rt_info")
            layer.insert(0, info)
        ElementTree.SubElement(info, "attribute", name="precise", version="0")
    tree.write(path, encoding="utf-8", xml_declaration=True)


def _torch(module: Callable[..., Sequence[Tensor]]) -> Predict:
    def run(images: np.ndarray) -> Sequence[np.ndarray]:
        with torch.no_grad():
            return [output.numpy() for output in module(torch.from_numpy(images))]

    return run


def _there(package: str) -> bool:
    try:
        importlib.import_module(package)
    except ImportError:
        return False
    return True
