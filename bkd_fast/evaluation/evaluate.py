"""Evaluation: metrics, scores and the report of a run, from its test images."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from bkd_fast.artifact import LOG, MANIFEST, category_folders, load_trained
from bkd_fast.data import (
    Category,
    ImageDataset,
    Sample,
    check_samples,
    find_categories,
    load_mask,
    resize_mask,
)
from bkd_fast.errors import BKDError
from bkd_fast.evaluation.environment import describe
from bkd_fast.evaluation.metrics import (
    METRIC_NAMES,
    PixelMetrics,
    classification_metrics,
    image_metrics,
    mean_metrics,
    mean_of,
    percent,
)
from bkd_fast.evaluation.pictures import heat_scale, inside, record
from bkd_fast.evaluation.report import CategoryReport, HeatScale, ImageRecord, write_report
from bkd_fast.files import atomic_write, write_json
from bkd_fast.inference.detector import Detector
from bkd_fast.model.bkd import BRANCHES
from bkd_fast.training.checkpoint import read_log

log = logging.getLogger("bkd_fast")
SCORE_COLUMNS = ("category", "file", "defect", "label", "score", "threshold", "decision")
BOTH = "both"


@dataclass
class _Branch:
    """What is gathered of one branch, or of both together, over a category's test images."""

    pixels: PixelMetrics
    scores: list[float] = field(default_factory=list)


def evaluate(
    run: str | Path,
    data: str | Path | None = None,
    *,
    device: str = "auto",
    skip_unreadable: bool = False,
    pictures: bool = True,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Measure a run and write ``metrics.json``, ``scores.csv``, ``overlays/`` and ``report.html`` into it.

    Args:
        run: a run folder.
        data: a data set with the run's categories; None = the one it was trained on.
        device: ``auto`` takes CUDA where there is a device.
        skip_unreadable: leave out images that cannot be decoded, with a warning that names them.
        pictures: False leaves out ``overlays/`` and ``report.html``.
        progress: a progress bar; None = where standard error is a terminal.

    Returns:
        What ``metrics.json`` holds: ``mean`` and ``categories``, each with the seven metrics of
        :data:`bkd_fast.evaluation.metrics.METRIC_NAMES` (None where undefined), and for each category ``branches``,
        ``decisions`` and ``images``, how many there were.

    Raises:
        BKDError: an unusable run or data set; a data set without test images.
    """
    run = Path(run)
    folders = category_folders(run)
    # Every category is read and checked before the first is measured.
    detectors = {name: Detector(load_trained(folder), device) for name, folder in folders.items()}
    tests = {name: _test_samples(folders[name], data, name, skip_unreadable) for name in folders}
    scale = heat_scale(list(detectors.values()))
    reports, rows = [], []
    metrics: dict[str, Any] = {"mean": {}, "categories": {}}
    for name, detector in detectors.items():
        report, figures = _measure(
            name, detector, tests[name], folders[name], run, scale if pictures else None, progress
        )
        reports.append(report)
        metrics["categories"][name] = figures
        rows += [
            dict(
                zip(
                    SCORE_COLUMNS,
                    (name, image.name, image.defect, image.label, image.score, detector.threshold, image.decision),
                    strict=True,
                )
            )
            for image in report.images
        ]
    metrics["mean"] = mean_metrics(metrics["categories"].values())
    write_json(run / "metrics.json", metrics)
    with atomic_write(run / "scores.csv") as file:
        writer = csv.DictWriter(file, SCORE_COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    if not pictures:
        return metrics
    config = next(iter(detectors.values())).config.to_dict()
    write_report(
        run / "report.html",
        title=f"BKD on {', '.join(folders)}",
        categories=reports,
        mean=metrics["mean"],
        config=config,
        environment=describe(),
        heat_scale=scale,
    )
    return metrics


def table(metrics: Mapping[str, Any]) -> str:
    """Return what :func:`evaluate` measured, in percent: a line a category, its branches under it, the mean last.

    The first two columns are what the threshold does: good images called anomalous, and defective ones called normal.
    """
    names = ["false alarms", "misses", *(name.replace("_", " ") for name in METRIC_NAMES)]
    rows: list[tuple[str, list[float | None]]] = []
    decided: list[list[float | None]] = []
    for category, figures in metrics["categories"].items():
        decisions = figures["decisions"]
        missed = None if decisions["recall"] is None else 1 - decisions["recall"]
        decided.append([decisions["false_alarm_rate"], missed])
        rows.append((category, [*decided[-1], *(figures[name] for name in METRIC_NAMES)]))
        branches = figures["branches"]
        rows += [
            (f"  {branch} only", [None, None, *(branches[branch][name] for name in METRIC_NAMES)])
            for branch in branches
            if branch != BOTH and len(branches) > 1
        ]
    means = [mean_of(column) for column in zip(*decided, strict=True)]
    rows.append(("mean", [*means, *(metrics["mean"][name] for name in METRIC_NAMES)]))
    width = max(len(label) for label, _ in rows)
    lines = [" " * width + "  " + "  ".join(names)]
    for label, values in rows:
        cells = (f"{percent(value):>{len(name)}}" for value, name in zip(values, names, strict=True))
        lines.append(f"{label:<{width}}  " + "  ".join(cells))
    return "\n".join(lines)


def _measure(
    name: str,
    detector: Detector,
    samples: list[Sample],
    folder: Path,
    run: Path,
    scale: HeatScale | None,
    progress: bool | None,
) -> tuple[CategoryReport, dict[str, Any]]:
    each = len(detector.model.branches()) > 1 and not detector.config.teacher.tile
    branches = {BOTH: BRANCHES, **({branch: (branch,) for branch in BRANCHES} if each else {})}
    gathered = {branch: _Branch(PixelMetrics()) for branch in branches}
    records: list[ImageRecord] = []
    unmasked = [sample for sample in samples if sample.label and sample.mask is None]
    bar = tqdm(
        total=len(samples), desc=f"evaluating {name}", unit="image", disable=None if progress is None else not progress
    )
    with bar:
        for part, predicted in _predicted(detector, samples, branches):
            size = predicted[BOTH][1].shape[1:]
            truths = [_truth(sample, (size[0], size[1])) for sample in part]  # each mask is decoded once
            for branch, (scores, maps) in predicted.items():
                gathered[branch].scores += scores
                for sample, truth, anomaly_map in zip(part, truths, maps, strict=True):
                    if truth is not None:
                        gathered[branch].pixels.update(anomaly_map, truth)
                    if branch == BOTH:
                        score = gathered[branch].scores[len(records)]
                        records.append(record(sample, score, anomaly_map, truth, detector, run, name, scale))
            bar.update(len(part))
    labels = [sample.label for sample in samples]
    figures: dict[str, dict[str, float | None]] = {}
    for branch, held in gathered.items():
        figures[branch] = {**image_metrics(labels, held.scores), **held.pixels.compute()}
    rows = read_log(folder / LOG)
    source = load_source(folder)
    notes = [f"{len(unmasked)} defective images have no mask and count for image metrics only"] if unmasked else []
    report = CategoryReport(
        name=name,
        metrics=figures[BOTH],
        branches=figures,
        threshold=detector.threshold,
        images=records,
        roc=gathered[BOTH].pixels.roc(),
        pro=gathered[BOTH].pixels.pro(),
        log=rows,
        seconds=sum(row["seconds"] for row in rows) if rows else None,
        train_count=len(source["train_files"]),
        inside=[] if scale is None else inside(name, detector, samples, records, run),
        notes=notes,
    )
    for held in gathered.values():
        held.pixels.close()
    decisions = classification_metrics(labels, [record.decision for record in records])
    counts = {"train": len(source["train_files"]), "validation": len(source["validation_files"]), "test": len(samples)}
    return report, {**figures[BOTH], "branches": figures, "decisions": decisions, "images": counts}


def _predicted(
    detector: Detector, samples: list[Sample], branches: Mapping[str, tuple[str, ...]]
) -> Iterator[tuple[list[Sample], dict[str, tuple[list[float], np.ndarray]]]]:
    """Some samples at a time with each branch's scores and maps, at the network's size; of tiles at the image's own."""
    if detector.config.teacher.tile:
        for sample in samples:
            prediction = detector(sample.path)
            yield [sample], {BOTH: ([prediction.score], prediction.anomaly_map[None])}
        return
    dataset = ImageDataset(samples, detector.config.teacher.image_size)
    for start in range(0, len(samples), detector.batch):
        stop = min(start + detector.batch, len(samples))
        result = detector.distill(torch.stack([dataset[index][0] for index in range(start, stop)]))
        found = {branch: detector.score_features(result, members) for branch, members in branches.items()}
        yield samples[start:stop], {branch: (s.tolist(), m.cpu().numpy()) for branch, (s, m) in found.items()}


def _truth(sample: Sample, size: tuple[int, int]) -> np.ndarray | None:
    """The mask at the map's size; all normal for a good image; None for a defective image without a mask."""
    if not sample.label:
        return np.zeros(size, bool)
    return None if sample.mask is None else resize_mask(load_mask(sample.mask), size)


def load_source(folder: Path) -> dict[str, Any]:
    """Where a category's images came from, as its manifest says."""
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["source"]


def _test_samples(folder: Path, data: str | Path | None, name: str, skip_unreadable: bool) -> list[Sample]:
    source = load_source(folder)
    root = Path(data) if data is not None else Path(source["root"])
    if data is None and not root.exists():
        raise BKDError(
            f"the data of {folder} is no longer at {root}: name its place, `bkd-fast evaluate {folder} DATA`"
        )
    extra = {key: Path(source[key]) for key in ("anomalous", "masks") if source[key] is not None and data is None}
    categories: list[Category] = find_categories(root, None, **extra)
    # A data set of one category is that category, whatever its folder is called.
    matching = [category for category in categories if category.name == name] or (
        categories if len(categories) == 1 else []
    )
    if not matching:
        found = ", ".join(category.name for category in categories)
        raise BKDError(f"{root} has no category {name!r}, which the run was trained on; it has {found}")
    if not matching[0].test:
        raise BKDError(
            f"{root} has no test images for {name!r}: expected test/good and test/<defect> folders, "
            "or train with --anomalous DIR on a plain folder. `bkd-fast predict` takes images without labels."
        )
    return check_samples(matching[0].test, skip_unreadable=skip_unreadable)
