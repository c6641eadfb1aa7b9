"""``bkd-fast predict``: write scores, decisions, heat maps and masks of new images."""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bkd_fast.artifact import read_content, write_manifest
from bkd_fast.data import ImageError, image_files
from bkd_fast.data.inputs import Masked
from bkd_fast.data.progress import progress_bar
from bkd_fast.data.roi import roi_files
from bkd_fast.data.tiles import check_tiles
from bkd_fast.errors import BKDError, check_float
from bkd_fast.evaluation.pictures import heat_scale
from bkd_fast.evaluation.report import HeatScale, ImageRecord, render_panel, write_overlay, write_predictions
from bkd_fast.files import MANIFEST, atomic_path, checksum, fitting, is_empty, locked, open_text
from bkd_fast.inference.detector import Detector
from bkd_fast.inference.drift import DriftMonitor, watch
from bkd_fast.inference.streaming import pipeline
from bkd_fast.version import __version__

log = logging.getLogger("bkd_fast")
WORKERS = 2  # threads that decode, draw and write while the network runs
COLUMNS = ("file", "score", "threshold", "decision", "normalized_score", "p_value", "name")
SCORES = "scores.csv"


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
    max_pixels: int | None = None,
    pages: str | None = None,
    pictures: bool = True,
    resume: bool = False,
    progress: bool | None = None,
    drift: bool = False,
    report: bool = False,
    roi: str | Path | None = None,
) -> str:
    """Predict images; write ``scores.csv``, ``heatmaps/`` (JPEG panels) and ``masks/`` (PNG) into ``out``.

    An image's row is written as soon as its pictures are. Its column ``name`` is the path of both pictures in their
    folders, without suffix.

    Args:
        run: folder of one trained category.
        images: image files, or folders of them (searched recursively).
        out: a new or empty folder, unless ``resume``.
        device: ``auto`` uses CUDA if there is a device.
        precision: ``32``, ``bf16`` or ``fp16``; see :meth:`bkd_fast.Detector.load`.
        tile, overlap: predict in tiles; see :meth:`bkd_fast.Detector.__call__`.
        threshold: replaces the run's image threshold.
        skip_unreadable: leave out images that cannot be predicted, with a warning; otherwise the first one is an error,
            and the results before it are kept.
        max_pixels, pages: see :meth:`bkd_fast.Detector.load`.
        pictures: False writes ``scores.csv`` alone.
        resume: leave out the images that ``out`` has a row for, and add the others.
        progress: show a progress bar; None: if standard error is a terminal, else a line now and then.
        drift: follow the images, and warn once when they are no longer like the run's normal images.
        report: also write ``report.html``, the pictures by falling score; needs the extra ``train`` (jinja2).
        roi: for a run with a mask for each image, the folder of their masks, by name.

    Returns:
        One line for the user: the number of images, how many are anomalous, and where the scores are.

    Raises:
        BKDError: no images, an ``out`` that is not empty, not writable or in use, other settings than those that
            ``out`` was begun with, an unreadable image, or an unusable run.
    """
    out = Path(out)
    if threshold is not None:
        threshold = check_float("threshold", threshold)
    if tile is not None:
        check_tiles(tile, overlap)
    if report:
        import_module("jinja2")  # a missing package is an error before the first image
        if not pictures:
            raise BKDError("the report shows the pictures: leave out --report, or --no-pictures")
    if not (resume or is_empty(out)):
        raise BKDError(f"the output folder {out} is not empty: choose another --out, or resume with --resume")
    files = _files([Path(image) for image in images])
    regions = {} if roi is None else dict(zip(files, roi_files(Path(roi), list(files.values())), strict=True))
    detector = Detector.load(run, device=device, precision=precision, max_pixels=max_pixels, pages=pages)
    whole = detector.predictor(tile, overlap)
    predictor = watch(detector, whole, DriftMonitor(detector.calibration)) if drift else whole
    if threshold is not None:
        detector.threshold = threshold
    settings = {
        "run": checksum(Path(run) / MANIFEST),
        "precision": precision,
        "tile": list(tile) if isinstance(tile, tuple) else tile,
        "overlap": overlap,
        "threshold": detector.threshold,
        "pictures": pictures,
        "roi": None if roi is None else str(Path(roi).resolve()),
    }
    with locked(out), _rows(out, settings, resume) as (rows, file):
        writer = csv.DictWriter(file, COLUMNS)
        named = _named(files, rows)
        scale = heat_scale([detector]) if pictures else None

        def read(image: tuple[str, Path]) -> tuple[np.ndarray, Any]:
            try:
                array = detector.read(image[1])
                return array, predictor.preprocess(Masked(array, regions[image[1]]) if regions else array)
            except BKDError as error:
                named_already = isinstance(error, ImageError) and str(image[1]) in str(error)
                raise error if named_already else ImageError(f"{image[1]}: {error}") from error

        def infer(read_images: list[tuple[np.ndarray, Any]]) -> list[tuple[np.ndarray, Any]]:
            arrays, prepared = zip(*read_images, strict=True)
            return list(zip(arrays, predictor.predict(list(prepared)), strict=True))

        def write(image: tuple[str, Path], predicted: tuple[np.ndarray, Any]) -> dict[str, str]:
            (name, path), (array, raw) = image, predicted
            prediction = predictor.postprocess(raw)
            if scale is not None:
                heat = prediction.anomaly_map / detector.pixel_threshold
                panel = render_panel(array, heat, prediction.mask, None, scale)
                write_overlay(fitting(out / "heatmaps" / f"{name}.jpg"), panel)
                with atomic_path(fitting(out / "masks" / f"{name}.png"), durable=False) as temporary:
                    Image.fromarray(prediction.mask.astype(np.uint8) * 255).save(temporary, format="PNG")
            decision = "anomalous" if prediction.label else "normal"
            scores = (prediction.score, detector.threshold, decision, prediction.normalized_score, prediction.p_value)
            return dict(zip(COLUMNS, map(str, (path, *scores, name)), strict=True))

        stages = pipeline(named.items(), read, infer, write, batch=detector.batch, workers=WORKERS)
        with progress_bar(len(files), "predicting", "image", progress, initial=len(files) - len(named)) as bar:
            for outcome in stages:
                if outcome.result is not None:
                    rows[outcome.result["file"]] = outcome.result
                    writer.writerow(outcome.result)
                    file.flush()
                elif skip_unreadable and isinstance(outcome.error, ImageError):
                    log.warning("skipped: %s", outcome.error)
                elif outcome.error is not None:
                    raise outcome.error
                bar.update()
        os.fsync(file.fileno())
        if report:
            _write_report(out, Path(run), detector, list(rows.values()), scale)
    anomalous = sum(row["decision"] == "anomalous" for row in rows.values())
    return f"{len(rows)} images, {anomalous} anomalous: {out / SCORES}"


def _write_report(
    out: Path, run: Path, detector: Detector, rows: Sequence[Mapping[str, str]], scale: HeatScale | None
) -> None:
    images = [
        ImageRecord(
            name=row["file"],
            defect="",
            label=None,
            score=float(row["score"]),
            decision=int(row["decision"] == "anomalous"),
            overlay=fitting(out / "heatmaps" / f"{row['name']}.jpg"),
        )
        for row in rows
    ]
    write_predictions(
        out / "report.html",
        title=f"Predictions of {run}",
        images=images,
        threshold=detector.threshold,
        normal=detector.calibration.normal,
        run=run,
        heat_scale=scale,
    )


@contextmanager
def _rows(out: Path, settings: Mapping[str, Any], resume: bool) -> Iterator[tuple[dict[str, dict[str, str]], Any]]:
    """Yield the rows that ``scores.csv`` has, by file, and the file itself, open at its end.

    Raises:
        BKDError: ``out`` holds something else, or was begun with other settings.
    """
    path, begun = out / SCORES, out / MANIFEST
    rows: dict[str, dict[str, str]] = {}
    if not is_empty(out):
        before = _settings(begun)
        different = [name for name in settings if before.get(name) != settings[name]]
        if not resume or different:
            raise BKDError(
                f"{out} was begun with another {' and '.join(different) or 'command'}: choose another --out, or resume "
                "with the same settings"
            )
    else:
        write_manifest(out, {"bkd_fast": __version__, "kind": "predictions", **settings})
    if path.is_file():
        data = path.read_bytes()
        os.truncate(path, data.rfind(b"\n") + 1)  # a power failure may have left half a line
        with open_text(path, "r") as file:
            earlier = list(csv.DictReader(file))
        for row in earlier:
            if set(row) != set(COLUMNS) or None in row.values():
                raise BKDError(f"{path} does not have the columns {', '.join(COLUMNS)}: choose another --out")
            rows[row["file"]] = row
    with open_text(path, "a") as file:
        if not file.tell():
            csv.writer(file).writerow(COLUMNS)
            file.flush()
        yield rows, file


def _settings(path: Path) -> dict[str, Any]:
    try:
        content = read_content(path)
    except (OSError, BKDError):
        content = {}
    if content.get("kind") != "predictions":
        raise BKDError(f"{path.parent} holds no predictions to resume: choose another --out")
    return content


def _files(arguments: Sequence[Path]) -> dict[Path, str]:
    """Return the image files with their paths relative to the folder that they were given by, without suffix."""
    named: dict[Path, str] = {}
    for argument in arguments:
        if argument.is_dir():
            files = {path: str(path.relative_to(argument).with_suffix("")) for path in image_files(argument)}
            if not files:
                raise BKDError(f"there are no images in the folder {argument}")
        elif argument.is_file():
            files = {argument: argument.stem}
        else:
            raise BKDError(f"there is no image or folder {argument}")
        named.update((path, name) for path, name in files.items() if path not in named)
    return named


def _named(files: Mapping[Path, str], rows: Mapping[str, Mapping[str, str]]) -> dict[str, Path]:
    """Return output name -> file for the files without a row; equal names get numbers."""
    taken = {row["name"] for row in rows.values()}
    named: dict[str, Path] = {}
    for path, name in files.items():
        if str(path) in rows:
            continue
        unique, number = name, 2
        while unique in taken:
            unique, number = f"{name}_{number}", number + 1
        taken.add(unique)
        named[unique] = path
    return named
