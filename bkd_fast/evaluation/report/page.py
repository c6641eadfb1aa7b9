"""``report.html``: a run's results in one file that loads nothing."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bkd_fast.decisions import NormalScores
from bkd_fast.errors import BKDError
from bkd_fast.evaluation.metrics import (
    ABSENT,
    FPR_LIMIT,
    METRIC_NAMES,
    classification_metrics,
    image_roc,
    mean_of,
    percent,
)
from bkd_fast.evaluation.report.explorer import BINS, explorer
from bkd_fast.evaluation.report.gallery import Gallery, by_outcome
from bkd_fast.evaluation.report.plots import FRAME, Axis, Chart, Series, histogram, line_chart
from bkd_fast.evaluation.report.records import CategoryReport, ImageRecord, Metrics
from bkd_fast.files import atomic_write
from bkd_fast.inference.heat import COLOURS, HeatScale

DECISIONS = ("precision", "recall", "f1", "false_alarm_rate")
LOSSES = ("total", "loss", "forward", "reverse", "validation_loss")
LOSS_STYLES = {"loss": "total", "validation_loss": "validation"}  # the CSS class, if it is not the name


def write_report(
    path: str | Path,
    *,
    title: str,
    categories: Sequence[CategoryReport],
    mean: Metrics,
    config: Mapping[str, Any],
    environment: Mapping[str, Any],
    heat_scale: HeatScale | None = None,
) -> None:
    """Write the page atomically, from ``template.html.jinja``.

    Args:
        path: the HTML file; overlays are linked relative to its folder.
        title: heading, plain text.
        categories: in the order they are shown.
        mean: :data:`bkd_fast.evaluation.metrics.METRIC_NAMES` averaged over the categories.
        config, environment: shown as tables; nested mappings become dotted names.
        heat_scale: the run's colour scale, shown as a legend.

    Raises:
        BKDError: an overlay cannot be read, or an image has no label.
    """
    gallery = Gallery(Path(path).parent, len(categories))
    sections: list[dict[str, Any]] = [
        {
            "category": category,
            "decisions": classification_metrics(_labels(category), [image.decision for image in category.images]),
            "charts": [*_score_charts(category), *_pixel_charts(category), *_loss_chart(category)],
            "groups": gallery.groups(category.images),
            "inside": gallery.inside(category.inside),
            "explorer": explorer(category, Path(path).parent),
        }
        for category in categories
    ]
    decisions = {name: mean_of(section["decisions"][name] for section in sections) for name in DECISIONS}
    outcomes = by_outcome([image for category in categories for image in category.images])
    _render(
        path,
        "template.html.jinja",
        title=title,
        sections=sections,
        mean=mean,
        mean_decisions=decisions,
        outcomes={name: len(images) for name, images in outcomes.items()},
        headlines=[
            ("Defects found", decisions["recall"]),
            ("False alarms", decisions["false_alarm_rate"]),
            ("Image AUROC", mean["image_auroc"]),
            ("Pixel AUROC", mean["pixel_auroc"]),
            ("AUPRO", mean["aupro"]),
        ],
        metric_names=METRIC_NAMES,
        decision_names=DECISIONS,
        group_starts=("image_auroc", "pixel_auroc", "precision"),  # columns with a line to their left
        scale=heat_scale,
        frame=FRAME,
        config=_flat(config),
        environment=_flat(environment),
        absent=ABSENT,
    )


def write_predictions(
    path: str | Path,
    *,
    title: str,
    images: Sequence[ImageRecord],
    threshold: float,
    normal: NormalScores | None = None,
    run: Path | None = None,
    heat_scale: HeatScale | None = None,
    note: str = "",
) -> None:
    """Write the page of images without ground truth, from ``predictions.html.jinja``: by falling score.

    Args:
        images: in any order; their ``label`` is not shown.
        threshold, normal, run: as in :class:`~bkd_fast.evaluation.report.CategoryReport`.
        path, title, heat_scale: as in :func:`write_report`.
        note: a sentence on the scores.

    Raises:
        BKDError: an overlay cannot be read, or the threshold or a score is not finite.
    """
    unlabelled = [replace(image, label=None) for image in images]
    category = CategoryReport(title, {}, {}, threshold, unlabelled, normal=normal, run=run)
    _render(
        path,
        "predictions.html.jinja",
        title=title,
        category=category,
        anomalous=sum(image.decision for image in images),
        cards=Gallery(Path(path).parent, 1).groups(unlabelled),
        explorer=explorer(category, Path(path).parent),
        scale=heat_scale,
        note=note,
    )


def _render(path: str | Path, template: str, **values: Any) -> None:
    """Write the page of a template atomically."""
    # Here: `predict` draws panels without them.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    jinja = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    jinja.filters.update(percent=percent, duration=_duration, px="{:.1f}".format)
    jinja.policies["json.dumps_kwargs"] = {"allow_nan": False}
    script = (Path(__file__).parent / "explorer.js").read_text(encoding="utf-8")
    page = jinja.get_template(template).render(
        **values,
        colours=["#" + bytes(colour.tolist()).hex() for colour in COLOURS[::15]],
        bins=BINS,
        script=Markup(script),  # a file of this package, without any value of the run
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    with atomic_write(path) as file:
        file.write(page + "\n")


def _labels(category: CategoryReport) -> list[int]:
    labels = [image.label for image in category.images if image.label is not None]
    if len(labels) < len(category.images):
        raise BKDError(f"images of {category.name} have no label: expected 0 or 1, or the page of write_predictions()")
    return labels


def _score_charts(category: CategoryReport) -> list[Chart]:
    if not category.images:
        return []
    labels = np.array(_labels(category))
    scores = np.array([image.score for image in category.images], float)
    groups = [("good", "good", scores[labels == 0]), ("defective", "bad", scores[labels == 1])]
    charts = [histogram("Image scores", [group for group in groups if len(group[2])], category.threshold, "score")]
    series = []
    if (roc := image_roc(labels, scores)) is not None:
        series.append(Series("images", "total", *roc))
    if category.roc is not None:
        series.append(Series("pixels", "forward", *category.roc))
    if series:
        axes = Axis(0, 1, "false positive rate"), Axis(0, 1, "true positive rate")
        charts.append(line_chart("ROC", *axes, series, diagonal=True))
    return charts


def _pixel_charts(category: CategoryReport) -> list[Chart]:
    if category.pro is None:
        return []
    axes = Axis(0, FPR_LIMIT, "pixel false positive rate"), Axis(0, 1, "mean overlap per region")
    return [line_chart("Per-region overlap (PRO)", *axes, [Series("regions", "reverse", *category.pro)], diagonal=True)]


def _loss_chart(category: CategoryReport) -> list[Chart]:
    series = []
    for key in LOSSES:
        rows = [(float(row["epoch"]), float(row[key])) for row in category.log if "epoch" in row and key in row]
        points = np.array([row for row in rows if all(map(math.isfinite, row))])
        if len(points):
            series.append(Series(key.replace("_", " "), LOSS_STYLES.get(key, key), points[:, 0], points[:, 1]))
    if not series:
        return []
    x_values, y_values = (np.concatenate([getattr(line, name) for line in series]) for name in "xy")
    epochs = Axis(float(x_values.min()), max(float(x_values.max()), float(x_values.min()) + 1), "epoch")
    return [line_chart("Training loss", epochs, Axis.around(y_values, "loss"), series)]


def _flat(facts: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return (dotted name, text) of each value of nested mappings."""
    rows: list[tuple[str, str]] = []
    for name, value in facts.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{name}.")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            rows.append((f"{prefix}{name}", ABSENT if value is None or text == "" else text))
    return rows


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ABSENT
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
