"""``bkd-fast calibrate``: set the thresholds of a run from new good images, or for another false-alarm rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

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
        manifest = read_category(run)
        if manifest.unified is not None:
            raise BKDError(f"{run} is one model of several categories, whose thresholds come from training")
        detector = Detector.load(run, device=device)
        before = detector.calibration
        rate = before.false_alarms if false_alarms is None else false_alarms
        normal, level, teacher = before.normal, before.normal_level, before.teacher
        if good is not None:
            rows: list[np.ndarray] = []
            scores, maxima, medians = _scores(detector, Path(good), masks, rows)
            normal, level = NormalScores("calibration", scores, maxima), float(np.median(medians))
            # Without an image's own statistics (tiles on a GPU) drift is watched by scores alone.
            teacher = statistics_of(torch.from_numpy(np.stack(rows))) if rows else {}
        after = Calibration.of(normal, level, rate, teacher)
        lines = [after.sentence(), f"image threshold {before.threshold:.4g} -> {after.threshold:.4g}"]
        if defects is not None:
            defective, _, _ = _scores(detector, Path(defects), masks, [])
            lines += _defects_found(after, defective)
        write_manifest(run, replace(manifest, calibration=after))
        return "\n".join(lines)


def _scores(
    detector: Detector, folder: Path, roi: Path | None, statistics: list[np.ndarray]
) -> tuple[list[float], list[float], list[float]]:
    """Return the scores of a folder's images, and the maximum and median of each anomaly map.

    Add their teacher's ``statistics``, see :func:`bkd_fast.model.calibration.level_statistics`.
    """
    files = image_files(folder) if folder.is_dir() else []
    if not files:
        raise BKDError(f"there are no images in {folder}: expected a folder of images")
    images: list[ImageLike] = [*files]
    if roi is not None:
        masks = roi_files(roi, [path.relative_to(folder).as_posix() for path in files])
        images = [Masked(path, mask) for path, mask in zip(files, masks, strict=True)]
    scores, maxima, medians = [], [], []

    def observe(_: float, row: np.ndarray | None) -> None:
        if row is not None:
            statistics.append(row)

    for outcome in Observed(detector, detector.predictor(), observe, every=1).stream(images):
        if outcome.result is None:
            raise outcome.error or BKDError(f"{outcome.item!r} cannot be read")
        scores.append(outcome.result.score)
        maxima.append(float(outcome.result.anomaly_map.max()))
        found = outcome.result.anomaly_map
        region = detector.region((found.shape[0], found.shape[1]), outcome.item)
        medians.append(float(np.median(found if region is None else found[region])))
    return scores, maxima, medians


def _defects_found(calibration: Calibration, defective: Sequence[float]) -> list[str]:
    """Return a table of the defects found at several false-alarm rates."""
    lines = [f"of {len(defective)} defective images", "  false alarms   threshold   found"]
    for rate, threshold, count in found_at_rates(calibration.scores, defective):
        lines.append(f"  {100 * rate:>10.1f} %   {threshold:>9.4g}   {count:>5}")
    return lines
