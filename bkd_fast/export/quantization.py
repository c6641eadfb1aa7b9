"""The teacher's convolutions of an exported graph in 8 bits, by NNCF.

Only the teacher is quantised, and of it neither the convolution that reads the image nor grouped ones: with 8 bits
there, features lose several times as much as in all others together, and the rest takes the time. All that follows the
features stays in float32, and the supports, memory items and thresholds are those of the float32 teacher.
"""

from __future__ import annotations

import importlib
import io
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from torch import Tensor

from bkd_fast.data import image_files
from bkd_fast.errors import BKDError
from bkd_fast.export.comparison import inputs, spread
from bkd_fast.inference.detector import Detector

TEACHER = "model.teacher.network."  # how the names of the teacher's weights begin in the graph
COLORS = 3
CALIBRATION = 64  # images that the ranges of activations come from; with 300 the features' error is about the same


def calibration_images(detector: Detector, folder: Path) -> list[Tensor]:
    """Return at most ``CALIBRATION`` of the good images in a folder, or tiles of them: (3, H, W) each.

    Raises:
        BKDError: no image is there, or one cannot be read.
    """
    files = image_files(folder) if folder.is_dir() else []
    if not files:
        raise BKDError(f"there are no images in {folder}: expected a folder of good images, such as those of training")
    images: list[Tensor] = []
    for image in inputs(detector, spread(files, CALIBRATION)):
        images.append(image)
        if len(images) == CALIBRATION:
            break
    return images


def quantized(model: Any, images: Sequence[Tensor]) -> Any:
    """Return an OpenVINO model of the whole graph with the teacher's convolutions in 8 bits.

    Args:
        model: what ``openvino.convert_model`` made of an exported graph.
        images: good ones (3, H, W), as the graph takes them.

    Raises:
        BKDError: the teacher has no convolution that can be quantised, as transformers have none.
    """
    chosen = teacher_convolutions(model)
    if not chosen:
        raise BKDError(
            "the teacher has no convolution to quantise: int8 is for convolutional teachers; export without it"
        )
    used = _upstream(chosen)
    names = {node.get_friendly_name() for node in chosen}
    others = [
        node.get_friendly_name()
        for node in model.get_ordered_ops()
        if node.get_friendly_name() not in used and node.get_type_name() not in ("Constant", "Parameter", "Result")
    ]
    kept = [name for name, node in used.items() if node.get_type_name().endswith("Convolution") and name not in names]
    with _quiet():
        nncf = importlib.import_module("nncf")
        return nncf.quantize(
            model,
            nncf.Dataset(images, lambda image: image[None].numpy()),
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(images),
            ignored_scope=nncf.IgnoredScope(names=sorted({*others, *kept})),
        )


def teacher_convolutions(model: Any) -> list[Any]:
    """Return the convolutions of an OpenVINO model that are quantised."""
    return [
        node
        for node in model.get_ordered_ops()
        if node.get_type_name() == "Convolution"
        and node.input_value(1).get_node().get_friendly_name().startswith(TEACHER)
        and node.input_value(1).get_shape()[1] > COLORS
    ]


def _upstream(nodes: Sequence[Any]) -> dict[str, Any]:
    """Return the operations that nodes depend on, and the nodes, by name."""
    found: dict[str, Any] = {}
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node.get_type_name() in ("Constant", "Parameter") or node.get_friendly_name() in found:
            continue
        found[node.get_friendly_name()] = node
        waiting += [value.get_node() for value in node.input_values()]
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep NNCF's notes and progress bars from the terminal; its errors are exceptions."""
    with redirect_stdout(io.StringIO()):
        importlib.import_module("nncf")  # which sets the level
        logger = logging.getLogger("nncf")
        before = logger.level
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(before)
