"""What a program must know to use an exported model: the same in the model file and in the JSON file beside it."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bkd_fast.data.tiles import overlap_of
from bkd_fast.errors import BKDError
from bkd_fast.export.graph import MAX_IMAGES
from bkd_fast.inference.detector import Detector
from bkd_fast.version import __version__

VERSION = 1  # of the settings; raised where one changes its meaning
INPUT, OUTPUTS = "images", ("scores", "anomaly_maps")
# Settings that a run-time needs to compute what the detector does: a CPU with bfloat16 would use that by default.
RUNTIME: dict[str, dict[str, str]] = {"openvino": {"INFERENCE_PRECISION_HINT": "f32"}}


def settings_of(detector: Detector, format: str, precision: str = "float32") -> dict[str, Any]:
    """Return the settings of a detector's exported model, by name.

    Args:
        detector: the run that is exported.
        format: see :func:`bkd_fast.export.export`.
        precision: ``float32``, or ``int8`` of the teacher's convolutions.
    """
    config, calibration = detector.config, detector.calibration
    tile = config.teacher.tile
    roi = None if detector.roi is None else detector.region(config.teacher.size)
    return {
        "settings_version": VERSION,
        "bkd_fast": __version__,
        "format": format,
        "precision": precision,  # int8: of the teacher's convolutions; all else is float32
        "teacher": config.teacher.name,
        "runtime": RUNTIME.get(format, {}),  # without these the thresholds do not fit
        "input": INPUT,
        "input_layout": "NCHW",
        "input_type": "float32",
        "input_size": list(config.teacher.size),  # height, width
        "input_range": [0, 1],
        "color_order": "RGB",
        "max_batch": MAX_IMAGES,
        "resize": "bilinear",
        "resize_antialias": True,
        "resize_keeps_aspect_ratio": False,
        "tile": tile,  # the model takes square tiles of this side, resized to input_size; null: whole images
        "tile_overlap": None if tile is None else overlap_of(tile),
        "integer_white": config.data.integer_white,  # of images of more than 8 bits; null: the training had none
        "float_white": config.data.float_white,
        "normalization": "in the graph",  # mean and std of the teacher's training images
        "border_correction": "in the graph",
        "roi": None if roi is None else "in the graph",  # a region of interest; maps are zero outside
        "roi_mask": None if roi is None else _png(roi),  # to show it: base64 of a PNG of input_size, white inside
        "output_scores": OUTPUTS[0],
        "output_maps": OUTPUTS[1],
        "score_meaning": "raw, unbounded; an image is anomalous where its score is above threshold",
        "map_meaning": "raw, of input_size; a pixel is anomalous where it is above pixel_threshold",
        "threshold": detector.threshold,
        "pixel_threshold": detector.pixel_threshold,
        "false_alarms": calibration.false_alarms,  # share of good images that threshold allows
        "score_std": calibration.spread,  # of good images; 1 / (1 + exp((threshold - score) / score_std)) is in [0, 1]
    }


def as_text(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the settings as model files hold them: texts as they are, all else as JSON."""
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in settings.items()}


def parse(texts: Mapping[str, str], path: Path) -> dict[str, Any]:
    """Return the inverse of :func:`as_text` for what a model file holds.

    Args:
        path: the file, for errors.

    Raises:
        BKDError: a file without these settings, or of another version of them.
    """
    written = "bkd-fast export RUN --format onnx|openvino|pt2|aoti"
    if "settings_version" not in texts:
        raise BKDError(f"{path} does not say how it is used: expected a file that `{written}` wrote; export it again")
    if texts["settings_version"] != str(VERSION):
        raise BKDError(
            f"{path} has settings of version {texts['settings_version']}, and this bkd_fast reads version {VERSION}: "
            "export it again"
        )
    return {name: _value(text) for name, text in texts.items()}


def _png(mask: np.ndarray) -> str:
    """Return the base64 text of a black and white PNG."""
    file = io.BytesIO()
    Image.fromarray(mask).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
