"""``bkd-fast calibrate``: set the thresholds of a run from new good images, or for another false-alarm rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from bkd_fast.artifact import Calibration, read_category, write_manifest
from bkd_fast.data import image_files
from bkd_fast.data.inputs import ImageLike, Masked
from bkd_fast.data.roi import roi_files
from bkd_fast.decisions import NormalScores, check_rate, found_at_rates
from bkd_fast.errors import BKDError
from bkd_fast.files import locked
from bkd_fast.inference.detector import Detector
from bkd_fast.inference.drift import Observed
from bkd_fast.model.calibration import statistics_of

Statistics = Mapping[str, list[float]]


def calibrate(
    run: str | Path,
    good: str | Path | None = None,
    *,
    false_alarms: float | None = None,
    defects: str | Path | None = None,
    roi: str | Path | None = None,
    device: str = "auto",
) -> str:
    """Set the thresholds of a run.

    Args:
        run: folder of one trained category; its ``manifest.json`` is replaced.
        good: folder of good images that were not used in training, for new thresholds; None: use the scores in the run.
            In a run of several categories they set the thresholds of the category that they are taken for.
        false_alarms: wanted false-alarm rate, between 0 and 1; None: the run's.
        defects: folder of defective images. The report says how many of them several rates would find; they do not
            change the thresholds.
        roi: for a run with a mask for each image, the folder of the masks of all these images, by name.
        device: ``auto`` uses CUDA if there is a device.

    Returns:
        A few lines for the user: the expected false alarms, the old and the new threshold, and the defects found.

    Raises:
        BKDError: an unusable run, no images, an unreadable image, or a rate that is not between 0 and 1. The run then
            stays unchanged. Also: another process writes to the run.
    """
    run = Path(run)
    if false_alarms is not None:
        check_rate(false_alarms)
    read_category(run)  # its errors before a lock is taken
    masks = None if roi is None else Path(roi)
    with locked(run):
        return _calibrated(run, None if good is None else Path(good), false_alarms, defects, masks, device)


class _Scored(NamedTuple):
    """An image's score, the maximum and the median of its map, and the category that it was taken for, if any."""

    score: float
    maximum: float
    median: float
    category: str | None


def _calibrated(
    run: Path,
    good: Path | None,
    false_alarms: float | None,
    defects: str | Path | None,
    roi: Path | None,
    device: str,
) -> str:
    manifest = read_category(run)
    detector = Detector.load(run, device=device)
    before, unified = detector.calibration, manifest.unified
    rate = before.false_alarms if false_alarms is None else false_alarms
    scored: list[_Scored] | None = None
    teacher = before.teacher
    if good is not None:
        rows: list[np.ndarray] = []
        scored = _scores(detector, good, roi, rows)
        # Without an image's own statistics (tiles on a GPU) drift is watched by scores alone.
        teacher = statistics_of(torch.from_numpy(np.stack(rows))) if rows else {}
    defective = [] if defects is None else _scores(detector, Path(defects), roi, [])
    if unified is None:
        after = _renewed(before, scored, rate, teacher)
        lines = _sentences(before, after)
        if defects is not None:
            lines += _defects_found(after, [image.score for image in defective])
    else:
        lines, own = [], []
        for name, old in zip(unified.names, unified.calibrations, strict=True):
            images = None if scored is None else [image for image in scored if image.category == name]
            own.append(_renewed(old, images or None, rate, old.teacher))
            lines += [f"{name}: {line}" for line in _sentences(old, own[-1])]
            if images == []:
                lines.append(f"{name}: no image was taken for it, its scores are those it had")
            found = [image.score for image in defective if image.category == name]
            if found:
                lines += _defects_found(own[-1], found, f" taken for {name}")
        unified = replace(unified, calibrations=own)
        after = _pooled(before, own, scored, rate, teacher)
    write_manifest(run, replace(manifest, calibration=after, unified=unified))
    return "\n".join(lines)


def _renewed(before: Calibration, scored: list[_Scored] | None, rate: float, teacher: Statistics) -> Calibration:
    """Return the thresholds of images, or without them those of the scores so far."""
    if scored is None:
        return Calibration.of(before.normal, before.normal_level, rate, teacher)
    normal = NormalScores("calibration", [image.score for image in scored], [image.maximum for image in scored])
    return Calibration.of(normal, float(np.median([image.median for image in scored])), rate, teacher)


def _pooled(
    before: Calibration, own: Sequence[Calibration], scored: list[_Scored] | None, rate: float, teacher: Statistics
) -> Calibration:
    """Return the calibration of all categories together, by which a detector watches for drift."""
    source = before.source if scored is None else "calibration"
    level = before.normal_level if scored is None else float(np.median([image.median for image in scored]))
    scores = [score for one in own for score in one.scores]
    maxima = [value for one in own for value in one.maxima]
    if scored is not None and any(one.source != "calibration" for one in own):
        teacher = before.teacher  # some category has no new images: their statistics would count as drift
    return Calibration.of(NormalScores(source, scores, maxima), level, rate, teacher)


def _sentences(before: Calibration, after: Calibration) -> list[str]:
    return [after.sentence(), f"image threshold {before.threshold:.4g} -> {after.threshold:.4g}"]


def _scores(detector: Detector, folder: Path, roi: Path | None, statistics: list[np.ndarray]) -> list[_Scored]:
    """Return what a folder's images score.

    Add their teacher's ``statistics``, see :func:`bkd_fast.model.calibration.level_statistics`.
    """
    files = image_files(folder) if folder.is_dir() else []
    if not files:
        raise BKDError(f"there are no images in {folder}: expected a folder of images")
    images: list[ImageLike] = [*files]
    if roi is not None:
        masks = roi_files(roi, [path.relative_to(folder).as_posix() for path in files])
        images = [Masked(path, mask) for path, mask in zip(files, masks, strict=True)]
    scored = []

    def observe(_: float, row: np.ndarray | None) -> None:
        if row is not None:
            statistics.append(row)

    for outcome in Observed(detector, detector.predictor(), observe, every=1).stream(images):
        if outcome.result is None:
            raise outcome.error or BKDError(f"{outcome.item!r} cannot be read")
        found = outcome.result.anomaly_map
        region = detector.region((found.shape[0], found.shape[1]), outcome.item)
        median = float(np.median(found if region is None else found[region]))
        scored.append(_Scored(outcome.result.score, float(found.max()), median, outcome.result.category))
    return scored


def _defects_found(calibration: Calibration, defective: Sequence[float], which: str = "") -> list[str]:
    """Return a table of the defects found at several false-alarm rates."""
    lines = [f"of {len(defective)} defective images{which}", "  false alarms   threshold   found"]
    for rate, threshold, count in found_at_rates(calibration.scores, defective):
        lines.append(f"  {100 * rate:>10.1f} %   {threshold:>9.4g}   {count:>5}")
    return lines
