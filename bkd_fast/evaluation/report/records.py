"""What a report is made from: plain facts, no model and no arrays of pixels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bkd_fast.errors import BKDError

Figures = Mapping[str, float | None]
Curve = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class ImageRecord:
    """One test image.

    Attributes:
        name: what the user knows it by, for instance ``hole/003.png``.
        defect: kind of defect, ``good`` for a good image.
        label: truth, 1 for a defective image.
        score: anomaly score.
        decision: 1 if called anomalous.
        overlay: the PNG of :func:`~bkd_fast.evaluation.report.render_panel`, shown small; None without a picture.
    """

    name: str
    defect: str
    label: int
    score: float
    decision: int
    overlay: Path | None = None


@dataclass(frozen=True)
class CategoryReport:
    """One category: what was measured and on what.

    Attributes:
        name: of the category.
        metrics: figures named in :data:`bkd_fast.evaluation.metrics.METRIC_NAMES`, 0..1 or None.
        branches: the same for each of ``forward``, ``reverse`` and ``both``, as far as the model has them.
        threshold: scores above it are called anomalous.
        images: every test image.
        roc: pixel ROC (false positive rate, true positive rate), None without masks.
        pro: (false positive rate up to 0.3, mean overlap per region), None without masks.
        log: a row an epoch: ``epoch``, ``total`` (or ``loss``), ``forward``, ``reverse``, ``validation_loss``.
        seconds: training time.
        train_count: normals trained on.
        inside: some of the images, with what :func:`render_inside` draws as ``overlay``.
        notes: sentences the reader must know, such as defective images without a mask.
    """

    name: str
    metrics: Figures
    branches: Mapping[str, Figures]
    threshold: float
    images: Sequence[ImageRecord]
    roc: Curve | None = None
    pro: Curve | None = None
    log: Sequence[Mapping[str, float]] = ()
    seconds: float | None = None
    train_count: int | None = None
    inside: Sequence[ImageRecord] = ()
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not math.isfinite(self.threshold):
            raise BKDError(f"the threshold of {self.name} is {self.threshold}: expected a finite number")
