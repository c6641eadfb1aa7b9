"""What a notebook shows of a detector and of a prediction."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from html import escape
from typing import TYPE_CHECKING

from PIL import Image

from bkd_fast.inference.heat import HeatScale

if TYPE_CHECKING:
    from bkd_fast.inference.detector import Detector
    from bkd_fast.inference.prediction import Prediction

SIDE = 256  # longest side of the heat map, in pixels


def detector_html(detector: Detector) -> str:
    """Return a table of what a detector is and what it decides by."""
    config, calibration = detector.config, detector.calibration
    thresholds = [("threshold", f"{detector.threshold:.5g}"), ("pixel threshold", f"{detector.pixel_threshold:.5g}")]
    if detector.unified is not None:
        thresholds = [
            (f"thresholds of {name}", f"{own.threshold:.5g}, pixels {own.pixel_threshold:.5g}")
            for name, own in zip(detector.unified.names, detector.unified.calibrations, strict=True)
        ]
    height, width = config.teacher.size
    tiles = f", in tiles of {config.teacher.tile}" if config.teacher.tile else ""
    return _table(
        "Detector",
        (
            ("teacher", config.teacher.name),
            ("image size", f"{height} × {width}{tiles}"),
            ("trained from", f"{detector.trained_on} good images"),
            *thresholds,
            ("thresholds from", f"{len(calibration.scores)} good images ({calibration.source})"),
            ("false alarms asked", f"{100 * calibration.false_alarms:.3g} %"),
            ("device", str(detector.device)),
        ),
    )


def prediction_html(prediction: Prediction) -> str:
    """Return the decision, the score and the heat map, on the colour scale of the run's report."""
    table = _table(
        "Prediction",
        (
            *(() if prediction.category is None else (("category", prediction.category),)),
            ("decision", "anomalous" if prediction.label else "normal"),
            ("score", f"{prediction.score:.5g}"),
            ("normalized score", f"{prediction.normalized_score:.3f} (threshold: 0.5)"),
            ("p-value", f"{prediction.p_value:.3g}"),
            ("pixels marked", f"{100 * float(prediction.mask.mean()):.3g} %"),
        ),
    )
    return f'<div style="display:flex;gap:1em;align-items:flex-start">{table}{_picture(prediction)}</div>'


def _table(title: str, rows: Iterable[tuple[str, str]]) -> str:
    cells = "".join(
        f'<tr><th style="text-align:left">{escape(name)}</th><td style="text-align:left">{escape(value)}</td></tr>'
        for name, value in rows
    )
    return f'<table><caption style="text-align:left">{escape(title)}</caption>{cells}</table>'


def _picture(prediction: Prediction) -> str:
    """Return the heat map as an image; nothing where the thresholds give no scale of colours."""
    level, threshold = prediction.heat or (0.0, 0.0)
    if not 0 < level < threshold:
        return ""
    heat = Image.fromarray(HeatScale(level, threshold * (threshold / level)).colours(prediction.anomaly_map))
    heat.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    heat.save(buffer, format="PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="heat map" width="{heat.width}" height="{heat.height}" src="data:image/png;base64,{data}">'
