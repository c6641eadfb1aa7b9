"""What ``explorer.js`` needs to move a category's threshold: every score as JSON, and the histograms it moves over."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bkd_fast.evaluation.report.gallery import link_to
from bkd_fast.evaluation.report.plots import Axis
from bkd_fast.evaluation.report.records import CategoryReport

BINS = 80


@dataclass(frozen=True)
class Strip:
    """The histogram of one group of images.

    Attributes:
        name, style: for the reader, and its CSS class.
        count: number of images.
        highest: number of images in the fullest bin.
        bars: (left, height) of each bin that is not empty, in percent of the strip; a bin is 100 / BINS wide.
    """

    name: str
    style: str
    count: int
    highest: int
    bars: list[tuple[float, float]]


@dataclass(frozen=True)
class Explorer:
    """The histograms over one axis, its ticks as (position in percent, label), and the data as JSON types."""

    strips: list[Strip]
    ticks: list[tuple[float, str]]
    data: dict[str, Any]


def explorer(category: CategoryReport, folder: Path) -> Explorer | None:
    """Return the explorer of one category on a page in ``folder``; None without images."""
    if not category.images:
        return None
    scores: dict[int | None, list[float]] = {0: [], 1: [], None: []}  # by label
    for image in category.images:
        scores[image.label].append(float(image.score))
    normal = [] if category.normal is None else sorted(float(score) for score in category.normal.scores)
    source = "" if category.normal is None else f"normal images, {category.normal.source}"
    axis = Axis.around(np.array([*scores[0], *scores[1], *scores[None], *normal, category.threshold]), "score")
    groups = [(source, "validation", normal), ("good", "good", scores[0]), ("defective", "bad", scores[1])]
    groups.append(("predicted", "third", scores[None]))
    images = sorted(category.images, key=lambda image: -image.score)
    data = {
        "threshold": float(category.threshold),
        "axis": {"low": axis.low, "high": axis.high, "log": axis.log},
        "normal": normal,
        "run": None if category.run is None else _argument(category.run),
        # One list a column: a data set has thousands of images.
        "name": [image.name for image in images],
        "truth": ["good" if image.label == 0 else image.defect for image in images],
        "label": [None if image.label is None else int(image.label) for image in images],
        "score": [float(image.score) for image in images],
        "link": [None if image.overlay is None else link_to(image.overlay, folder) for image in images],
    }
    return Explorer(
        [_strip(name, style, values, axis) for name, style, values in groups if values],
        [(100 * axis.share(tick), f"{tick:.3g}") for tick in axis.ticks()],
        data,
    )


def _strip(name: str, style: str, values: Sequence[float], axis: Axis) -> Strip:
    edges = axis.steps(BINS)
    edges[0], edges[-1] = axis.low, axis.high  # as numpy rounds them, an end could be cut off
    counts = np.histogram(values, edges)[0].tolist()
    highest = max(counts)
    bars = [(100 * index / BINS, 100 * count / highest) for index, count in enumerate(counts) if count]
    return Strip(name, style, len(values), highest, bars)


def _argument(folder: Path) -> str:
    """Return a folder as an argument for a POSIX shell that is not taken for an option."""
    text = str(folder)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)
