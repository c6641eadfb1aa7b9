"""The pictures of an evaluation: an overlay for each image, and a look inside the model for some."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from bkd_fast.data import Sample, resize_image
from bkd_fast.data.inputs import masked
from bkd_fast.evaluation.report import HeatScale, ImageRecord, by_outcome, render_inside, render_panel, write_overlay
from bkd_fast.files import fitting
from bkd_fast.inference.detector import Detector
from bkd_fast.inference.explain import explain


def draw_overlay(
    path: Path,
    image: np.ndarray,
    anomaly_map: np.ndarray,
    truth: np.ndarray | None,
    score: float,
    detector: Detector,
    scale: HeatScale,
) -> None:
    """Write the overlay of one image.

    Args:
        path: the PNG file.
        image: (H, W, 3) uint8, any size.
        anomaly_map: (h, w) float32.
        truth: (h, w) bool, the ground truth; None: not drawn.
        score: of the image.
        scale: in units of the pixel threshold, so that one scale serves all categories of a run.
    """
    pixel_threshold = detector.pixel_threshold
    panel = render_panel(
        resize_image(image, (anomaly_map.shape[0], anomaly_map.shape[1])),
        anomaly_map / pixel_threshold,
        anomaly_map > pixel_threshold,
        truth,
        scale,
        score=score,
        threshold=detector.threshold,
    )
    write_overlay(path, panel)


def inside(detector: Detector, samples: Sequence[Sample], records: Sequence[ImageRecord]) -> list[ImageRecord]:
    """Return the record of one image of each outcome, with a picture of the inside of the model as overlay.

    The picture is ``NAME.inside.png`` beside the image's overlay, which the records must have.
    """
    by_name = {record.name: sample for record, sample in zip(records, samples, strict=True)}
    pictured = []
    for record in (group[0] for group in by_outcome(records).values() if group):
        assert record.overlay is not None
        sample = by_name[record.name]
        image = detector.read(sample.path)
        picture = fitting(record.overlay.with_suffix(".inside.png"))
        write_overlay(picture, render_inside(image, explain(detector, masked(image, sample.roi))))
        pictured.append(replace(record, overlay=picture))
    return pictured


def heat_scale(detectors: Sequence[Detector]) -> HeatScale:
    """Return a logarithmic scale around the pixel threshold, in units of it: 1 is marked.

    It reaches down to the lowest median of normal pixels among the detectors, and as far up.
    """
    reach = max(detector.pixel_threshold / detector.calibration.normal_level for detector in detectors)
    return HeatScale(1 / reach, reach, unit="times the pixel threshold", threshold=1.0)
