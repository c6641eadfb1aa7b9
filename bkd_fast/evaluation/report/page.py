"""``report.html``: everything a reader needs about a run in one file that loads nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from bkd_fast.evaluation.metrics import FPR_LIMIT, METRIC_NAMES, classification_metrics, image_roc, mean_of
from bkd_fast.evaluation.report.gallery import Gallery
from bkd_fast.evaluation.report.heat import COLOURS, HeatScale
from bkd_fast.evaluation.report.plots import Axis, Series, histogram, line_chart
from bkd_fast.evaluation.report.records import CategoryReport, Figures
from bkd_fast.files import atomic_write

ABSENT = "—"
DECISIONS = ("precision", "recall", "f1", "false_alarm_rate")
LOSSES = (
    ("total", "total"),
    ("loss", "total"),
    ("forward", "forward"),
    ("reverse", "reverse"),
    ("validation_loss", "validation"),
)
HEADLINES = (("image_auroc", "Image AUROC"), ("pixel_auroc", "Pixel AUROC"), ("aupro", "AUPRO"))
COLUMNS = '<th class="first">AUROC</th><th>AP</th><th>F1-max</th>' * 2 + "<th>AUPRO</th>"
FIRST = ("image_auroc", "pixel_auroc", "precision")  # a line to the left sets the groups of columns apart


def write_report(
    path: str | Path,
    *,
    title: str,
    categories: Sequence[CategoryReport],
    mean: Figures,
    config: Mapping[str, Any],
    environment: Mapping[str, Any],
    heat_scale: HeatScale | None = None,
) -> None:
    """Writes the page, whole or not at all.

    Args:
        path: the HTML file; overlays are linked relative to its folder.
        title: heading, plain text.
        categories: in the order they are shown.
        mean: :data:`bkd_fast.evaluation.metrics.METRIC_NAMES` averaged over the categories.
        config, environment: shown as tables; mappings inside them become dotted names.
        heat_scale: the run's colour scale, shown as a legend.

    Raises:
        BKDError: an overlay that cannot be read.
    """
    gallery = Gallery(Path(path).parent, len(categories))
    sections = "".join(_category(index, category, gallery) for index, category in enumerate(categories))
    style = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    body = (
        f"<header><h1>{escape(title)}</h1><p>{_summary(categories)}</p>{_headlines(mean, categories)}</header>"
        f"<section><h2>How to read this</h2>{_guide(heat_scale)}</section>"
        f"<section><h2>Results</h2>{_results(categories, mean)}</section>{sections}"
        f"<section><h2>Configuration</h2>{_facts(config)}</section>"
        f"<section><h2>Environment</h2>{_facts(environment)}</section>"
    )
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>\n{style}</style></head><body><main>{body}</main></body></html>\n"
    )
    with atomic_write(path) as file:
        file.write(page)


def _summary(categories: Sequence[CategoryReport]) -> str:
    images = [image for category in categories for image in category.images]
    defective = sum(1 for image in images if image.label)
    missed = sum(1 for image in images if image.label and not image.decision)
    alarms = sum(1 for image in images if not image.label and image.decision)
    sizes = f"{_count(len(categories), 'category', 'categories')}, {_count(len(images), 'test image')}"
    return (
        f"{sizes}: {defective} defective of which {missed} missed, "
        f"{len(images) - defective} good of which {alarms} called anomalous."
    )


def _headlines(mean: Figures, categories: Sequence[CategoryReport]) -> str:
    """Return the tiles at the top: what the thresholds do, then what the scores could do."""
    suffix = ", mean" if len(categories) > 1 else ""
    decisions = [_decisions(category) for category in categories]
    values = [
        (mean_of([decided["recall"] for decided in decisions]), "Defects found"),
        (mean_of([decided["false_alarm_rate"] for decided in decisions]), "False alarms"),
        *((mean.get(name), label) for name, label in HEADLINES),
    ]
    tiles = (f"<div><b>{_percent(value)}</b><span>{label}{suffix}</span></div>" for value, label in values)
    return f'<div class="headlines">{"".join(tiles)}</div>'


def _guide(scale: HeatScale | None) -> str:
    text = (
        "<p>All figures are in percent and larger is better, except false alarms; F1-max and the curves try every "
        "threshold on the test images, the columns under <em>decisions</em> use the one that was fixed on good images "
        f"before any test image was seen, and {ABSENT} marks a figure that the data given cannot have. Pictures show "
        "the image, its anomaly heat map on one colour scale for the whole run, and outlines of what was "
        '<b class="predicted">predicted</b> and of the <b class="truth">ground truth</b>: select one to open it.</p>'
    )
    if scale is None:
        return text
    stops = ",".join("#" + bytes(colour.tolist()).hex() for colour in COLOURS[::15])
    unit = f"{escape(scale.unit)}{', logarithmic' if scale.log else ''}"
    return (
        f'{text}<p class="scale"><span>{scale.low:.3g}</span><i style="background:linear-gradient(90deg,{stops})"></i>'
        f"<span>{scale.high:.3g}</span><span>{unit}</span></p>"
    )


def _results(categories: Sequence[CategoryReport], mean: Figures) -> str:
    head = (
        '<thead><tr><th rowspan="2">Category</th><th colspan="2">Images</th><th class="first" colspan="3">Image level'
        '</th><th class="first" colspan="4">Pixel level</th><th class="first" colspan="4">Decisions</th>'
        '<th rowspan="2">Training</th></tr>'
        f"<tr><th>train</th><th>test</th>{COLUMNS}"
        '<th class="first">precision</th><th>recall</th><th>F1</th><th>false alarms</th></tr></thead>'
    )
    decided = [_decisions(category) for category in categories]
    rows = []
    for index, (category, decisions) in enumerate(zip(categories, decided, strict=True)):
        train = ABSENT if category.train_count is None else str(category.train_count)
        rows.append(
            f'<tr><th><a href="#category-{index}">{escape(category.name)}</a></th><td>{train}</td>'
            f"<td>{len(category.images)}</td>{_cells(category.metrics, METRIC_NAMES)}{_cells(decisions, DECISIONS)}"
            f"<td>{_duration(category.seconds)}</td></tr>"
        )
    averages = {name: mean_of(row[name] for row in decided) for name in DECISIONS}
    rows.append(
        f'<tr class="mean"><th>Mean</th><td></td><td></td>{_cells(mean, METRIC_NAMES)}'
        f"{_cells(averages, DECISIONS)}<td></td></tr>"
    )
    return f'<div class="scroll"><table>{head}<tbody>{"".join(rows)}</tbody></table></div>'


def _category(index: int, category: CategoryReport, gallery: Gallery) -> str:
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in category.notes)
    charts = [*_score_charts(category), *_pixel_charts(category), *_loss_chart(category)]
    pictures = gallery.render(category.images, category.threshold)
    inside = gallery.inside(category.inside, category.threshold)
    if not category.images:
        notes += '<p class="note">There are no test images, so nothing was measured.</p>'
    return (
        f'<section id="category-{index}"><h2>{escape(category.name)}</h2>{notes}{_branches(category)}'
        f'<div class="charts">{"".join(charts)}</div>{pictures}{inside}</section>'
    )


def _branches(category: CategoryReport) -> str:
    if not category.branches:
        return ""
    rows = "".join(
        f"<tr><th>{escape(name)}</th>{_cells(figures, METRIC_NAMES)}</tr>"
        for name, figures in category.branches.items()
    )
    head = (
        '<thead><tr><th rowspan="2">Branch</th><th class="first" colspan="3">Image level</th>'
        '<th class="first" colspan="4">Pixel level</th></tr>'
        f"<tr>{COLUMNS}</tr></thead>"
    )
    return f'<div class="scroll"><table>{head}<tbody>{rows}</tbody></table></div>'


def _score_charts(category: CategoryReport) -> list[str]:
    if not category.images:
        return []
    labels = np.array([image.label for image in category.images])
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


def _pixel_charts(category: CategoryReport) -> list[str]:
    if category.pro is None:
        return []
    axes = Axis(0, FPR_LIMIT, "false positive rate of pixels"), Axis(0, 1, "mean overlap per region")
    return [line_chart("Per-region overlap (PRO)", *axes, [Series("regions", "reverse", *category.pro)], diagonal=True)]


def _loss_chart(category: CategoryReport) -> list[str]:
    series = []
    for key, style in LOSSES:
        rows = [(float(row["epoch"]), float(row[key])) for row in category.log if "epoch" in row and key in row]
        points = np.array([row for row in rows if all(map(math.isfinite, row))])
        if len(points):
            series.append(Series(key.replace("_", " "), style, points[:, 0], points[:, 1]))
    if not series:
        return []
    x_values, y_values = (np.concatenate([getattr(line, name) for line in series]) for name in "xy")
    epochs = Axis(float(x_values.min()), max(float(x_values.max()), float(x_values.min()) + 1), "epoch")
    return [line_chart("Training loss", epochs, Axis.around(y_values, "loss"), series)]


def _decisions(category: CategoryReport) -> dict[str, float | None]:
    return classification_metrics(
        [image.label for image in category.images], [image.decision for image in category.images]
    )


def _facts(facts: Mapping[str, Any]) -> str:
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in _flat(facts))
    return f'<table class="facts"><tbody>{rows}</tbody></table>' if rows else f"<p>{ABSENT}</p>"


def _flat(facts: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for name, value in facts.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{name}.")
        else:
            listed = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            rows.append((f"{prefix}{name}", ABSENT if value is None or listed == "" else listed))
    return rows


def _cells(figures: Figures, names: Sequence[str]) -> str:
    classes = (' class="first"' if name in FIRST else "" for name in names)
    return "".join(f"<td{style}>{_percent(figures.get(name))}</td>" for name, style in zip(names, classes, strict=True))


def _percent(value: float | None) -> str:
    return ABSENT if value is None else f"{100 * value:.1f}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ABSENT
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"
