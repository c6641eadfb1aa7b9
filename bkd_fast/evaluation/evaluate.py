"""``bkd-fast evaluate``: metrics, scores and the report of a run, from test images."""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bkd_fast.artifact import LOG, Manifest, category_folders, move, read_category, staging, write_manifest
from bkd_fast.data import Sample, check_samples, find_categories, fit_roi, resize_mask, truth_of
from bkd_fast.data.dataset import with_rois
from bkd_fast.data.inputs import masked
from bkd_fast.data.progress import progress_bar
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
from bkd_fast.evaluation.pictures import draw_overlay, heat_scale, inside
from bkd_fast.evaluation.report import CategoryReport, HeatScale, ImageRecord, write_report
from bkd_fast.files import atomic_write, fitting, locked, write_json
from bkd_fast.inference.detector import Detector
from bkd_fast.model.bkd import BRANCHES
from bkd_fast.training.checkpoint import read_log
from bkd_fast.version import __version__

SCORE_COLUMNS = ("category", "file", "defect", "label", "score", "threshold", "decision")
BOTH = "both"
OVERLAYS = "overlays"
log = logging.getLogger("bkd_fast")


def evaluate(
    run: str | Path,
    data: str | Path | None = None,
    *,
    out: str | Path | None = None,
    anomalous: str | Path | None = None,
    masks: str | Path | None = None,
    roi: str | Path | None = None,
    device: str = "auto",
    skip_unreadable: bool = False,
    pictures: bool = True,
    progress: bool | None = None,
    loggers: Any = None,
) -> dict[str, Any]:
    """Evaluate a run, and write ``metrics.json``, ``scores.csv``, ``overlays/`` and ``report.html``.

    Images that the run was trained or validated on are no test images. Of a plain folder, those set aside in training
    and those that are new since count; new ones are named in a note. A run that is one model of several categories is
    evaluated on each of them; an image is decided by the thresholds of the category that it is nearest to.

    Args:
        run: a run folder.
        data: a data set with the run's categories; None: the one it was trained on.
        out: the folder to write to; None: the run folder.
        anomalous, masks: for a plain folder, as in :func:`bkd_fast.train`; None: those given in training, if ``data``
            is None.
        roi: for a run with a mask for each image, the folder of the masks of the test images, by name, or by kind and
            name.
        device: ``auto`` uses CUDA if there is a device.
        skip_unreadable: leave out images that cannot be decoded, with a warning that names them.
        pictures: False leaves out ``overlays/`` and ``report.html``.
        progress: show a progress bar; None: in a terminal or a notebook, else a line now and then.
        loggers: experiment trackers that get the metrics, as in :func:`bkd_fast.train`. A tracker that ``run`` was
            trained with continues that run; ``csv`` begins a further file.

    Returns:
        The content of ``metrics.json``: ``mean`` and ``categories`` with the seven
        :data:`bkd_fast.evaluation.metrics.METRIC_NAMES` in 0..1 (None if undefined). Each category also has
        ``branches``, ``decisions``, and the numbers of ``images`` for ``train``, ``validation`` and ``test``; of one
        model of several categories, also ``nearest``: the share of the test images that are nearest to each.

    Raises:
        BKDError: an unusable run or data set, no test images, or another process writes to ``out``.
    """
    for package in ("sklearn", "jinja2"):
        import_module(package)  # what the metrics and the report need is missing now, not after the last image
    run = Path(run)
    out = run if out is None else Path(out)
    watching: AbstractContextManager[Sequence[Any]] = nullcontext(())
    if loggers:
        from bkd_fast.training.loggers import check_loggers, open_loggers  # here: without, nothing needs Lightning

        watching = open_loggers(check_loggers(loggers), out, begun=run)
    folders = category_folders(run)
    several = read_category(next(iter(folders.values()))).unified is not None
    if several and (anomalous is not None or masks is not None):
        raise BKDError(f"{run} is one model of several categories: leave out --anomalous and --masks")
    with locked(out):
        if out.resolve() != run.resolve():
            write_manifest(out, {"bkd_fast": __version__, "kind": "evaluation"})
        manifests = {name: read_category(folder) for name, folder in folders.items()}
        # Load and check all categories before the first is evaluated.
        detectors = {name: Detector.load(folder, device=device) for name, folder in folders.items()}
        unified = next(iter(detectors.values())).unified
        if unified is not None:
            (manifest,), (detector,) = manifests.values(), detectors.values()
            folders = dict.fromkeys(unified.names, run)
            manifests = {name: _of_category(manifest, name) for name in unified.names}
            detectors = {name: detector.for_category(name) for name in unified.names}
        tests = {
            name: _test_samples(
                folders[name], manifests[name], data, name, anomalous, masks, roi, skip_unreadable, detectors[name]
            )
            for name in folders
        }
        scale = heat_scale(list(detectors.values())) if pictures else None
        reports, rows = [], []
        metrics: dict[str, Any] = {"mean": {}, "categories": {}}
        with staging(out) as made, watching as trackers:
            for name, detector in detectors.items():
                report, metrics["categories"][name], nearest = _evaluate_category(
                    name, detector, tests[name], manifests[name], read_log(folders[name] / LOG), made, scale, progress
                )
                # `bkd-fast calibrate`, which the report names for a run, sets the rate of all categories at once.
                reports.append(replace(report, run=folders[name] if unified is None else None))
                for image, category in zip(report.images, nearest, strict=True):
                    threshold = detector.for_category(category).threshold
                    row = (name, image.name, image.defect, image.label, image.score, threshold, image.decision)
                    rows.append(row if category is None else (*row, category))
            metrics["mean"] = mean_metrics(metrics["categories"].values())
            # Until here, the results of an earlier evaluation are as they were.
            if scale is not None:
                move(made / OVERLAYS, out / OVERLAYS)
            for tracker in trackers:
                tracker.log_metrics(_logged(metrics), 0)
        write_json(out / "metrics.json", metrics)
        with atomic_write(out / "scores.csv") as file:
            columns = SCORE_COLUMNS if unified is None else (*SCORE_COLUMNS, "nearest")
            csv.writer(file).writerows([columns, *rows])
        if scale is not None:
            write_report(
                out / "report.html",
                title=f"BKD on {', '.join(folders)}",
                categories=[_moved(report, made, out) for report in reports],
                mean=metrics["mean"],
                config=next(iter(detectors.values())).config.to_dict(),
                environment=describe(),
                heat_scale=scale,
            )
    return metrics


def _logged(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics as trackers take them: ``CATEGORY/evaluation/NAME`` if there are several; none undefined."""
    several = len(metrics["categories"]) > 1
    logged = {f"mean/evaluation/{name}": value for name, value in metrics["mean"].items() if several}
    for category, values in metrics["categories"].items():
        prefix = f"{category}/evaluation" if several else "evaluation"
        logged |= {f"{prefix}/{name}": values[name] for name in METRIC_NAMES}
        logged |= {f"{prefix}/{name}": values["decisions"][name] for name in ("false_alarm_rate", "recall")}
    return {name: value for name, value in logged.items() if value is not None}


def table(metrics: Mapping[str, Any]) -> str:
    """Return the metrics of :func:`evaluate` as a table in percent: the categories with their branches, and the mean.

    The first two columns depend on the threshold: good images predicted anomalous, and defective ones predicted normal.
    """
    names = ["false alarms", "misses", *(name.replace("_", " ") for name in METRIC_NAMES)]
    rows: list[tuple[str, list[float | None]]] = []
    decided: list[list[float | None]] = []
    for name, category in metrics["categories"].items():
        decisions = category["decisions"]
        misses = None if decisions["recall"] is None else 1 - decisions["recall"]
        decided.append([decisions["false_alarm_rate"], misses])
        rows.append((name, [*decided[-1], *(category[metric] for metric in METRIC_NAMES)]))
        rows += [
            (f"  {branch} only", [None, None, *(values[metric] for metric in METRIC_NAMES)])
            for branch, values in category["branches"].items()
            if branch != BOTH
        ]
    means = [mean_of(column) for column in zip(*decided, strict=True)]
    rows.append(("mean", [*means, *(metrics["mean"][name] for name in METRIC_NAMES)]))
    width = max(len(label) for label, _ in rows)
    lines = [" " * width + "  " + "  ".join(names)]
    for label, values in rows:
        cells = (f"{percent(value):>{len(name)}}" for value, name in zip(values, names, strict=True))
        lines.append(f"{label:<{width}}  " + "  ".join(cells))
    right = [category["nearest"][name] for name, category in metrics["categories"].items() if "nearest" in category]
    if right:
        lines.append(f"nearest to their own category: {percent(mean_of(right)).strip()} % of the images")
    return "\n".join(lines)


def _evaluate_category(
    name: str,
    detector: Detector,
    samples: list[Sample],
    manifest: Manifest,
    log_rows: list[dict[str, float]],
    out: Path,
    scale: HeatScale | None,
    progress: bool | None,
) -> tuple[CategoryReport, dict[str, Any], list[str | None]]:
    """Return the report and the metrics of one category, and of each image the nearest category.

    Write its overlays below ``out`` if there is a ``scale``.
    """
    whole = detector.config.teacher.tile or detector.unified is not None
    separate = len(detector.model.branches()) > 1 and not whole
    branches = {BOTH: BRANCHES, **({branch: (branch,) for branch in BRANCHES} if separate else {})}
    pixels = {branch: PixelMetrics() for branch in branches}
    scores: dict[str, list[float]] = {branch: [] for branch in branches}
    records: list[ImageRecord] = []
    outside = 0  # defective images without a defect inside the region of interest
    nearest: list[str | None] = []
    with progress_bar(len(samples), f"evaluating {name}", "image", progress) as bar:
        for part, images, predicted, categories in _predictions(detector, samples, branches):
            nearest += categories
            height, width = predicted[BOTH][1].shape[1:]
            truths = [_truth(sample, (height, width), detector) for sample in part]
            rois = [detector.region((height, width), masked(b"", sample.roi)) for sample in part]
            outside += sum(
                bool(sample.label) and truth is not None and not truth.any()
                for sample, truth in zip(part, truths, strict=True)
            )
            for branch, (part_scores, maps) in predicted.items():
                scores[branch] += part_scores
                for truth, anomaly_map, roi in zip(truths, maps, rois, strict=True):
                    if truth is not None:
                        pixels[branch].update(anomaly_map, truth, roi)
            for sample, image, truth, score, anomaly_map, category in zip(
                part, images, truths, *predicted[BOTH], categories, strict=True
            ):
                own, overlay = detector.for_category(category), None
                if scale is not None:
                    overlay = out / fitting(Path(OVERLAYS, name, f"{sample.key}.png"))
                    draw_overlay(overlay, image, anomaly_map, truth if sample.label else None, score, own, scale)
                decision = int(score > own.threshold)
                records.append(ImageRecord(sample.key, sample.defect, sample.label, score, decision, overlay))
            bar.update(len(part))
    labels = [sample.label for sample in samples]
    metrics = {branch: {**image_metrics(labels, scores[branch]), **pixels[branch].compute()} for branch in branches}
    unmasked = sum(sample.label and not sample.masks for sample in samples)
    source = manifest.source
    notes = [f"{unmasked} defective images have no mask and count for image metrics only"] if unmasked else []
    if detector.config.roi is not None:
        notes.append(
            "Pixels outside the region of interest count for no metric. "
            f"{outside} defective images have no defect inside, and count as defective nevertheless"
        )
    report = CategoryReport(
        name=name,
        metrics=metrics[BOTH],
        branches=metrics,
        threshold=detector.threshold,
        images=records,
        roc=pixels[BOTH].roc(),
        pro=pixels[BOTH].pro(),
        log=log_rows,
        seconds=sum(row["seconds"] for row in log_rows) if log_rows else None,
        train_count=len(source.all_train),
        inside=[] if scale is None else inside(detector, samples, records),
        notes=notes,
    )
    for accumulator in pixels.values():
        accumulator.close()
    decisions = classification_metrics(labels, [record.decision for record in records])
    counts = {"train": len(source.all_train), "validation": len(source.all_validation), "test": len(samples)}
    found: dict[str, Any] = {**metrics[BOTH], "branches": metrics, "decisions": decisions, "images": counts}
    if detector.unified is not None:
        found["nearest"] = {other: nearest.count(other) / len(nearest) for other in detector.unified.names}
    return report, found, nearest


def _of_category(manifest: Manifest, name: str) -> Manifest:
    """Return the manifest of one of several categories of a model, with its own images."""
    source, prefix = manifest.source, f"{name}/"
    train, validation = (
        {path.removeprefix(prefix): record for path, record in files.items() if path.startswith(prefix)}
        for files in (source.train_files, source.validation_files)
    )
    return replace(manifest, source=replace(source, train_files=train, validation_files=validation))


def _predictions(
    detector: Detector, samples: list[Sample], branches: Mapping[str, tuple[str, ...]]
) -> Iterator[tuple[list[Sample], list[np.ndarray], dict[str, tuple[list[float], np.ndarray]], list[str | None]]]:
    """Yield samples in batches, their images (H, W, 3) uint8, scores and maps (N, h, w) of each branch, and categories.

    Maps have the network's size; those of a run in tiles have the image's size, and there is one image in a batch.
    """
    tiled = bool(detector.config.teacher.tile)
    batch = 1 if tiled else detector.batch
    for start in range(0, len(samples), batch):
        part = samples[start : start + batch]
        images = [detector.read(sample.path) for sample in part]
        if tiled:
            prediction = detector(masked(images[0], part[0].roi))
            yield part, images, {BOTH: ([prediction.score], prediction.anomaly_map[None])}, [None]
            continue
        if detector.unified is not None:
            raws = detector.predict([detector.preprocess(image) for image in images])
            maps = np.stack([raw.anomaly_map.cpu().numpy() for raw in raws])
            yield part, images, {BOTH: ([raw.score for raw in raws], maps)}, [raw.category for raw in raws]
            continue
        given = [detector.preprocess(masked(image, sample.roi)) for sample, image in zip(part, images, strict=True)]
        regions = [each.region for each in given if each.region is not None]
        result = detector.distill(
            torch.stack([each.input for each in given]), torch.stack(regions) if regions else None
        )
        scored = {branch: detector.score_features(result, members) for branch, members in branches.items()}
        arrays = {branch: (scores.tolist(), maps.cpu().numpy()) for branch, (scores, maps) in scored.items()}
        yield part, images, arrays, [None] * len(part)


def _truth(sample: Sample, size: tuple[int, int], detector: Detector) -> np.ndarray | None:
    """Return the ground truth ``size`` bool, all False for a good image; None for a defective one without a mask.

    Defects outside the detector's region of interest are none.
    """
    if not sample.label:
        return np.zeros(size, bool)
    truth = truth_of(sample, detector.config.data)
    roi = detector.roi_of(masked(b"", sample.roi))
    if truth is not None and roi is not None:
        truth = truth & fit_roi(roi, (truth.shape[0], truth.shape[1]), sample.path)
    return None if truth is None else resize_mask(truth, size)


def _moved(report: CategoryReport, made: Path, out: Path) -> CategoryReport:
    """Return a report whose overlays have moved from ``made`` to ``out``."""

    def there(image: ImageRecord) -> ImageRecord:
        return image if image.overlay is None else replace(image, overlay=out / image.overlay.relative_to(made))

    return replace(report, images=[*map(there, report.images)], inside=[*map(there, report.inside)])


def _test_samples(
    folder: Path,
    manifest: Manifest,
    data: str | Path | None,
    name: str,
    anomalous: str | Path | None,
    masks: str | Path | None,
    roi: str | Path | None,
    skip_unreadable: bool,
    detector: Detector,
) -> list[Sample]:
    """Return the usable test images of a category, in ``data`` or where it was trained."""
    source = manifest.source
    root = Path(source.root if data is None else data)
    if data is None and not root.exists():
        raise BKDError(f"the data of {folder} is no longer at {root}: pass its new path as DATA")
    if data is None:
        anomalous, masks = anomalous or source.anomalous, masks or source.masks
    bad, truths = (None if given is None else Path(given) for given in (anomalous, masks))
    categories = find_categories(root, anomalous=bad, masks=truths, used=source.used)
    # In a data set of one category, the name of its folder does not matter.
    matching = [category for category in categories if category.name == name] or (
        categories if len(categories) == 1 and detector.unified is None else []
    )
    if not matching:
        names = ", ".join(category.name for category in categories)
        raise BKDError(f"{root} has no category {name!r}, which the run was trained on; it has {names}")
    if not matching[0].test:
        raise BKDError(f"{root} has no test images for {name!r}: expected test/DEFECT folders, or --anomalous DIR")
    if matching[0].plain:
        good = {sample.name for sample in matching[0].test if not sample.label}
        for files, what in (
            (sorted(good - source.test_files.keys()), "new since training; they count as good test images"),
            (sorted(source.test_files.keys() - good), "missing, which were set aside for testing"),
        ):
            if files:
                log.warning("%d images in %s are %s: %s", len(files), root, what, ", ".join(files[:10]))
    config = detector.config
    each = config.roi is not None and detector.roi is None
    if each != (roi is not None):
        raise BKDError(
            f"{folder} looks at another region of each image: pass the folder of the test images' masks, --roi FOLDER"
            if each
            else f"{folder} has no mask for each image: leave out --roi"
        )
    return check_samples(
        matching[0].test if roi is None else with_rois(matching[0].test, Path(roi)),
        skip_unreadable=skip_unreadable,
        tile=config.teacher.tile,
        config=config.data,
        roi=detector.roi,
    )
