"""The pictures of an evaluation: an overlay for each image, and a look inside the model for some."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from bkd_fast.data import Sample, load_image, resize_image
from bkd_fast.evaluation.report import HeatScale, ImageRecord, by_kind, render_inside, render_panel, write_overlay
from bkd_fast.inference.detector import Detector
from bkd_fast.inference.explain import explain


def record(
    sample: Sample,
    score: float,
    anomaly_map: np.ndarray,
    truth: np.ndarray | None,
    detector: Detector,
    run: Path,
    category: str,
    scale: HeatScale | None,
) -> ImageRecord:
    """What the report says of an image; its picture is written where there is a scale for it."""
    overlay = run / "overlays" / category / sample.defect / f"{sample.path.name}.png"
    if scale is not None:
        picture = resize_image(load_image(sample.path), (anomaly_map.shape[0], anomaly_map.shape[1]))
        # Heat is shown in units of the category's own threshold, so that one scale serves the whole run.
        panel = render_panel(
            picture,
            anomaly_map / detector.pixel_threshold,
            anomaly_map > detector.pixel_threshold,
            truth if sample.label else None,
            scale,
        )
        write_overlay(overlay, panel)
    return ImageRecord(
        name=f"{sample.defect}/{sample.path.name}",
        defect=sample.defect,
        label=sample.label,
        score=score,
        decision=int(score > detector.threshold),
        overlay=overlay if scale is not None else None,
    )


def inside(
    category: str, detector: Detector, samples: Sequence[Sample], records: Sequence[ImageRecord], run: Path
) -> list[ImageRecord]:
    """One image of each outcome, with a picture of what happens inside the model."""
    chosen = [group[0] for group in by_kind(records).values() if group]
    paths = {record.name: sample.path for record, sample in zip(records, samples, strict=True)}
    found = []
    for record in chosen:
        image = load_image(paths[record.name])
        picture = run / "overlays" / category / record.defect / f"{paths[record.name].name}.inside.png"
        write_overlay(picture, render_inside(image, explain(detector, image)))
        found.append(replace(record, overlay=picture))
    return found


def heat_scale(detectors: Sequence[Detector]) -> HeatScale:
    """Logarithmic, around the threshold (1): from the plainest category's median normal pixel to as far above."""
    reach = max(detector.pixel_threshold / detector.calibration.normal_level for detector in detectors)
    return HeatScale(1 / reach, reach, unit="times the pixel threshold")
