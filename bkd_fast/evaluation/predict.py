"""``bkd-fast predict``: write scores, decisions, heat maps and masks of new images."""

from __future__ import annotations

import csv
import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from PIL import Image

from bkd_fast.artifact import read_content, write_manifest
from bkd_fast.data import image_files
from bkd_fast.data.arrivals import Arrival, Arrivals
from bkd_fast.data.inputs import masked
from bkd_fast.data.progress import progress_bar
from bkd_fast.data.roi import roi_files
from bkd_fast.data.tiles import check_tiles
from bkd_fast.errors import BKDError, ImageError, check_float
from bkd_fast.evaluation.pictures import heat_scale
from bkd_fast.evaluation.report import HeatScale, ImageRecord, render_panel, write_overlay, write_predictions
from bkd_fast.files import MANIFEST, atomic_path, atomic_write, checksum, fitting, is_empty, locked, open_text
from bkd_fast.inference.detector import Detector
from bkd_fast.inference.drift import DriftMonitor, watch
from bkd_fast.inference.streaming import pipeline
from bkd_fast.training.interruption import interruptible
from bkd_fast.version import __version__

log = logging.getLogger("bkd_fast")
WORKERS = 2  # threads that decode, draw and write while the network runs
COLUMNS = ("file", "score", "threshold", "decision", "normalized_score", "p_value", "name")
NUMBERS = ("score", "threshold", "normalized_score", "p_value")
SCORES, LINES = "scores.csv", "predictions.jsonl"


class Summary(NamedTuple):
    """How many images have a row in ``out``, how many of them are anomalous, and how many could not be read now."""

    out: Path
    images: int
    anomalous: int
    unreadable: int

    def sentence(self) -> str:
        """Return it in words, with the path of the table."""
        unreadable = f", {self.unreadable} could not be read" if self.unreadable else ""
        return f"{self.images} images, {self.anomalous} anomalous{unreadable}: {self.out / SCORES}"


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
    watching: bool = False,
    watch_seconds: float | None = None,
    watch_idle: float | None = None,
    roi: str | Path | None = None,
) -> Summary:
    """Predict images; write ``scores.csv``, ``predictions.jsonl``, ``heatmaps/`` and ``masks/`` into ``out``.

    An image's row and JSON line are written as soon as its pictures are (a JPEG panel and a PNG mask), each whole. The
    column ``name`` is the path of both pictures in their folders, without suffix. ``manifest.json`` has the settings.

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
        pictures: False writes ``scores.csv`` and ``predictions.jsonl`` alone.
        resume: leave out the images that ``out`` has a row for, and add the others.
        progress: show a progress bar; None: in a terminal or a notebook, else a line now and then.
        drift: follow the images, and warn once when they are no longer like the run's normal images.
        report: also write ``report.html``, the pictures by falling score; needs the extra ``train`` (jinja2).
        watching: predict the images in folders and those that arrive (:class:`bkd_fast.data.arrivals.Arrivals`), until
            Ctrl-C. What cannot be read is named and tried again once the file has changed.
        watch_seconds, watch_idle: stop watching after this time, or after this time without a new image, in seconds.
        roi: for a run with a mask for each image, the folder of their masks, by name.

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
    if watching and roi is not None:
        raise BKDError("--roi names the masks of images that are there already: leave out --watch")
    for option, seconds in (("--watch-seconds", watch_seconds), ("--watch-idle", watch_idle)):
        if seconds is not None:
            check_float(option, seconds, 0)
            if not watching:
                raise BKDError(f"{option} says when to stop watching: add --watch")
    if not (resume or is_empty(out)):
        raise BKDError(f"the output folder {out} is not empty: choose another --out, or resume with --resume")
    folders = [Path(image) for image in images]
    if watching:
        _check_watched(folders, out)
    files = {} if watching else _files(folders)
    regions = {} if roi is None else dict(zip(files, roi_files(Path(roi), list(files.values())), strict=True))
    detector = Detector.load(run, device=device, precision=precision, max_pixels=max_pixels, pages=pages)
    columns = COLUMNS if detector.unified is None else (*COLUMNS, "category")
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
    scale = heat_scale([detector]) if pictures else None

    def read(image: tuple[str, Arrival]) -> tuple[np.ndarray, Any]:
        path = image[1].path
        try:
            array = detector.read(path)
            return array, predictor.preprocess(masked(array, regions.get(path)))
        except BKDError as error:
            named_already = isinstance(error, ImageError) and str(path) in str(error)
            raise error if named_already else ImageError(f"{path}: {error}") from error

    def infer(read_images: list[tuple[np.ndarray, Any]]) -> list[tuple[np.ndarray, Any]]:
        arrays, prepared = zip(*read_images, strict=True)
        return list(zip(arrays, predictor.predict(list(prepared)), strict=True))

    def write(image: tuple[str, Arrival], predicted: tuple[np.ndarray, Any]) -> dict[str, Any]:
        (name, arrival), (array, raw) = image, predicted
        prediction = predictor.postprocess(raw)
        own = detector.for_category(prediction.category)
        if scale is not None:
            heat = prediction.anomaly_map / own.pixel_threshold
            panel = render_panel(
                array, heat, prediction.mask, None, scale, score=prediction.score, threshold=own.threshold
            )
            write_overlay(fitting(out / "heatmaps" / f"{name}.jpg"), panel)
            with atomic_path(fitting(out / "masks" / f"{name}.png"), durable=False) as temporary:
                Image.fromarray(prediction.mask.astype(np.uint8) * 255).save(temporary, format="PNG")
        decision = "anomalous" if prediction.label else "normal"
        scores = (prediction.score, own.threshold, decision, prediction.normalized_score, prediction.p_value)
        category = () if prediction.category is None else (prediction.category,)
        return dict(zip(columns, (str(arrival.path), *scores, name, *category), strict=True))

    unreadable: set[Path] = set()
    stopping: AbstractContextManager[list[bool]] = interruptible() if watching else nullcontext([False])
    with locked(out), _table(out, settings, resume, columns) as table, stopping as stopped:
        arrivals = Arrivals(folders, table.files, seconds=watch_seconds, idle=watch_idle, stopped=lambda: stopped[0])
        new = [Arrival(path, name) for path, name in files.items() if str(path) not in table.files]
        if watching:
            log.info("watching %s: stop with Ctrl-C", ", ".join(map(str, folders)))
        source = _named(arrivals if watching else new, table.names)
        stages = pipeline(source, read, infer, write, batch=detector.batch, workers=WORKERS)
        bar = progress_bar(
            len(files), "predicting", "image", False if watching else progress, initial=len(files) - len(new)
        )
        with closing(arrivals), bar:
            for (name, arrival), row, error in stages:
                if row is not None:
                    table.add(row)
                    unreadable.discard(arrival.path)
                    if watching and row["decision"] == "anomalous":
                        log.info("anomalous: %s, score %.4g above %.4g", arrival.path, row["score"], row["threshold"])
                elif watching and isinstance(error, ImageError):
                    table.names.discard(name)
                    if arrival.path.exists():
                        unreadable.add(arrival.path)
                        log.warning("could not be read: %s", error)
                    else:
                        log.info("deleted before it was read: %s", arrival.path)
                    arrivals.retry(arrival)
                elif skip_unreadable and isinstance(error, ImageError):
                    unreadable.add(arrival.path)
                    log.warning("skipped: %s", error)
                elif error is not None:
                    raise error
                bar.update()
        table.sync()
        if report:
            _write_report(out, Path(run), detector, _read_rows(out / SCORES, columns), scale)
    return Summary(out, len(table.files), table.anomalous, len(unreadable))


def _write_report(
    out: Path, run: Path, detector: Detector, rows: Sequence[Mapping[str, str]], scale: HeatScale | None
) -> None:
    """Write ``report.html``; of several categories with scores less the threshold of each, so that one can be moved."""
    unified = detector.unified
    several = unified is not None
    images = [
        ImageRecord(
            name=f"{row['category']}: {row['file']}" if several else row["file"],
            defect="",
            label=None,
            score=float(row["score"]) - (float(row["threshold"]) if several else 0),
            decision=int(row["decision"] == "anomalous"),
            overlay=fitting(out / "heatmaps" / f"{row['name']}.jpg"),
        )
        for row in rows
    ]
    normal = detector.calibration.normal
    if unified is not None:
        scores = [score - one.threshold for one in unified.calibrations for score in one.scores]
        normal = replace(normal, scores=scores)
    write_predictions(
        out / "report.html",
        title=f"Predictions of {run}",
        images=images,
        threshold=0.0 if several else detector.threshold,
        normal=normal,
        run=None if several else run,
        heat_scale=scale,
        note="Scores are less the threshold of the category that an image was taken for." if several else "",
    )


class _Table:
    """``scores.csv`` and ``predictions.jsonl``, open at their ends, and which files and names they have."""

    def __init__(
        self, scores: IO[str], lines: IO[str], rows: Sequence[Mapping[str, str]], columns: Sequence[str]
    ) -> None:
        self.scores, self.lines = scores, lines
        self.files, self.names = {row["file"] for row in rows}, {row["name"] for row in rows}
        self.anomalous = sum(row["decision"] == "anomalous" for row in rows)
        self.writer = csv.DictWriter(scores, columns)

    def add(self, row: Mapping[str, Any]) -> None:
        """Write a row and its JSON line, and hand them to the system."""
        self.writer.writerow(row)
        self.scores.flush()
        self.lines.write(_line(row))
        self.lines.flush()
        self.files.add(row["file"])
        self.anomalous += row["decision"] == "anomalous"

    def sync(self) -> None:
        """Wait until everything is on disk."""
        for file in (self.scores, self.lines):
            os.fsync(file.fileno())


@contextmanager
def _table(out: Path, settings: Mapping[str, Any], resume: bool, columns: Sequence[str]) -> Iterator[_Table]:
    """Open the tables in ``out``, whose rows so far are kept.

    ``scores.csv`` says what is done: a process may have been killed between a row and its JSON line, so the lines
    are written again from the rows.

    Raises:
        BKDError: ``out`` holds something else, or was begun with other settings.
    """
    path, begun = out / SCORES, out / MANIFEST
    if not is_empty(out):
        before = _settings(begun)
        different = [name for name in settings if before.get(name) != settings[name]]
        if not resume or different:
            raise BKDError(f"{out} was begun with another {' and '.join(different) or 'command'}: choose another --out")
    else:
        write_manifest(out, {"bkd_fast": __version__, "kind": "predictions", **settings})
    rows: list[dict[str, str]] = []
    if path.is_file():
        data = path.read_bytes()
        os.truncate(path, data.rfind(b"\n") + 1)  # a power failure may have left half a line
        rows = _read_rows(path, columns)
        with atomic_write(out / LINES) as file:
            file.writelines(_line({**row, **{name: float(row[name]) for name in NUMBERS}}) for row in rows)
    with open_text(path, "a") as scores, open_text(out / LINES, "a") as lines:
        if not scores.tell():
            csv.writer(scores).writerow(columns)
            scores.flush()
        yield _Table(scores, lines, rows, columns)


def _read_rows(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    with open_text(path, "r") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        if set(row) != set(columns) or None in row.values() or not all(_is_number(row[name]) for name in NUMBERS):
            raise BKDError(f"{path} does not have the columns {', '.join(columns)}: choose another --out")
    return list({row["file"]: row for row in rows}.values())


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _line(row: Mapping[str, Any]) -> str:
    """Return a row as a JSON line; a number that is not finite is ``null``."""
    values = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()
    }
    return json.dumps(values, allow_nan=False) + "\n"


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


def _check_watched(folders: Sequence[Path], out: Path) -> None:
    """Raise a BKDError for what cannot be watched."""
    for folder in folders:
        if not folder.is_dir():
            raise BKDError(f"there is no folder {folder}: --watch takes folders, which may be empty")
        if out.resolve() in (folder.resolve(), *folder.resolve().parents):
            raise BKDError(f"the folder {folder} is in the output folder {out}: choose another --out")


def _named(arrivals: Iterable[Arrival], taken: set[str]) -> Iterator[tuple[str, Arrival]]:
    """Yield the files with names that are not ``taken``: equal names get numbers."""
    for arrival in arrivals:
        unique, number = arrival.name, 2
        while unique in taken:
            unique, number = f"{arrival.name}_{number}", number + 1
        taken.add(unique)
        yield unique, arrival
