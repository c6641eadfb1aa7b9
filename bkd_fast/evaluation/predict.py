"""``bkd-fast predict``: write scores, decisions, heat maps and masks of new images."""

from __future__ import annotations

import csv
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bkd_fast.data import ImageError, image_files
from bkd_fast.data.tiles import check_tiles
from bkd_fast.errors import BKDError, check_float
from bkd_fast.evaluation.pictures import heat_scale
from bkd_fast.evaluation.report import ImageRecord, render_panel, write_overlay, write_predictions
from bkd_fast.files import atomic_path, atomic_write
from bkd_fast.inference.detector import Detector
from bkd_fast.inference.streaming import pipeline

log = logging.getLogger("bkd_fast")
WORKERS = 2  # threads that decode, draw and write while the network runs
COLUMNS = ("file", "score", "threshold", "decision", "normalized_score", "p_value")


def predict(
    run: str | Path,
    images: Sequence[str | Path],
    out: str | Path,
    *,
    device: str = "auto",
    precision: str = "32",
    tile: int | tuple[int, int] | None = None,
    overlap: int = 0,
    threshold: float | None = None,
    skip_unreadable: bool = False,
    report: bool = False,
    max_pixels: int | None = None,
    pages: str | None = None,
) -> str:
    """Predict images; write ``scores.csv``, ``heatmaps/`` (JPEG panels) and ``masks/`` (PNG) into ``out``.

    Args:
        run: folder of one trained category.
        images: image files, or folders of them (searched recursively).
        out: a new or empty folder.
        device: ``auto`` uses CUDA if there is a device.
        precision: ``32``, ``bf16`` or ``fp16``; see :meth:`bkd_fast.Detector.load`.
        tile, overlap: predict in tiles; see :meth:`bkd_fast.Detector.__call__`.
        threshold: replaces the run's image threshold.
        skip_unreadable: leave out unreadable images, with a warning; otherwise the first one is an error, and the
            results before it are kept.
        report: also write ``report.html``, the pictures by falling score; needs the extra ``train`` (jinja2).
        max_pixels, pages: see :meth:`bkd_fast.Detector.load`.

    Returns:
        One line for the user: the number of images, how many are anomalous, and where the scores are.

    Raises:
        BKDError: no images, an ``out`` that is not empty or not writable, an unreadable image, or an unusable run.
    """
    out = Path(out)
    if threshold is not None:
        threshold = check_float("threshold", threshold)
    if tile is not None:
        check_tiles(tile, overlap)
    if report:
        import jinja2  # noqa: F401 (so that a missing package is an error before the first image)
    named = _names([Path(image) for image in images])
    detector = Detector.load(run, device=device, precision=precision, max_pixels=max_pixels, pages=pages)
    predictor = detector.predictor(tile, overlap)
    if threshold is not None:
        detector.threshold = threshold
    if out.exists() and any(out.iterdir()):
        raise BKDError(f"the output folder {out} is not empty: choose another --out")
    scale = heat_scale([detector])
    rows: list[dict[str, object]] = []

    def read(image: tuple[str, Path]) -> tuple[np.ndarray, Any]:
        array = detector.read(image[1])
        return array, predictor.preprocess(array)

    def infer(read_images: list[tuple[np.ndarray, Any]]) -> list[tuple[np.ndarray, Any]]:
        arrays, prepared = zip(*read_images, strict=True)
        return list(zip(arrays, predictor.predict(list(prepared)), strict=True))

    def write(image: tuple[str, Path], predicted: tuple[np.ndarray, Any]) -> dict[str, object]:
        (name, path), (array, raw) = image, predicted
        prediction = predictor.postprocess(raw)
        panel = render_panel(array, prediction.anomaly_map / detector.pixel_threshold, prediction.mask, None, scale)
        write_overlay(out / "heatmaps" / f"{name}.jpg", panel)
        with atomic_path(_with_folder(out / "masks" / f"{name}.png")) as temporary:
            Image.fromarray(prediction.mask.astype(np.uint8) * 255).save(temporary, format="PNG")
        decision = "anomalous" if prediction.label else "normal"
        scores = (prediction.score, detector.threshold, decision, prediction.normalized_score, prediction.p_value)
        return dict(zip(COLUMNS, (str(path), *scores), strict=True))

    try:
        for outcome in pipeline(named.items(), read, infer, write, batch=detector.batch, workers=WORKERS):
            if outcome.result is not None:
                rows.append(outcome.result)
            elif skip_unreadable and isinstance(outcome.error, ImageError):
                log.warning("skipped: %s", outcome.error)
            elif outcome.error is not None:
                raise outcome.error
    finally:
        if rows:
            with atomic_write(out / "scores.csv") as file:
                writer = csv.DictWriter(file, COLUMNS)
                writer.writeheader()
                writer.writerows(rows)
    if report:
        names = {str(path): name for name, path in named.items()}
        write_predictions(
            out / "report.html",
            title=f"Predictions of {run}",
            images=[
                ImageRecord(
                    name=str(row["file"]),
                    defect="",
                    label=None,
                    score=float(str(row["score"])),
                    decision=int(row["decision"] == "anomalous"),
                    overlay=out / "heatmaps" / f"{names[str(row['file'])]}.jpg",
                )
                for row in rows
            ],
            threshold=detector.threshold,
            normal=detector.calibration.normal,
            run=Path(run),
            heat_scale=scale,
        )
    anomalous = sum(row["decision"] == "anomalous" for row in rows)
    return f"{len(rows)} images, {anomalous} anomalous: {out / 'scores.csv'}"


def _names(arguments: Sequence[Path]) -> dict[str, Path]:
    """Return the image file of each output name; files of the same name get numbers."""
    named: dict[str, Path] = {}
    for argument in arguments:
        if argument.is_dir():
            files = [(str(path.relative_to(argument).with_suffix("")), path) for path in image_files(argument)]
            if not files:
                raise BKDError(f"there are no images in the folder {argument}")
        elif argument.is_file():
            files = [(argument.stem, argument)]
        else:
            raise BKDError(f"there is no image or folder {argument}")
        for name, path in files:
            unique, number = name, 2
            while unique in named:
                unique, number = f"{name}_{number}", number + 1
            named[unique] = path
    return named


def _with_folder(path: Path) -> Path:
    """Return ``path`` after creating its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
