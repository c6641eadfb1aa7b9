"""What a report is made from: plain values, no model and no pixels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bkd_fast.decisions import NormalScores
from bkd_fast.errors import BKDError

Metrics = Mapping[str, float | None]
Curve = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class ImageRecord:
    """One image.

    Attributes:
        name: for the reader, such as ``hole/003.png``.
        defect: the kind of defect; ``good`` for a good image.
        label: ground truth, 1 for a defective image; None: unknown.
        score: anomaly score.
        decision: 1 if predicted anomalous.
        overlay: the PNG of :func:`~bkd_fast.evaluation.report.render_panel`, shown as a thumbnail; None: no picture.
    """

    name: str
    defect: str
    label: int | None
    score: float
    decision: int
    overlay: Path | None = None


@dataclass(frozen=True)
class CategoryReport:
    """The results of one category.

    Attributes:
        name: name of the category.
        metrics: the :data:`bkd_fast.evaluation.metrics.METRIC_NAMES`, in 0..1 or None.
        branches: the same for ``both`` branches, and for ``forward`` and ``reverse`` if the model has both.
        threshold: images with a higher score are predicted anomalous.
        images: every test image; all or none of them with a label.
        roc: pixel ROC (false positive rate, true positive rate); None without masks.
        pro: (false positive rate up to 0.3, mean overlap per region); None without masks.
        log: one row per epoch: ``epoch``, ``total`` (or ``loss``), ``forward``, ``reverse``, ``validation_loss``.
        seconds: training time in s.
        train_count: number of training images.
        inside: some of the images; their ``overlay`` is from :func:`~bkd_fast.evaluation.report.render_inside`.
        notes: remarks for the reader, such as that masks are missing.
        normal: scores of normal images that the threshold comes from; None: unknown.
        run: the folder to calibrate, as the user gave it; None: the page shows no command.

    Raises:
        BKDError: the threshold or a score is not finite.
    """

    name: str
    metrics: Metrics
    branches: Mapping[str, Metrics]
    threshold: float
    images: Sequence[ImageRecord]
    roc: Curve | None = None
    pro: Curve | None = None
    log: Sequence[Mapping[str, float]] = ()
    seconds: float | None = None
    train_count: int | None = None
    inside: Sequence[ImageRecord] = ()
    notes: Sequence[str] = ()
    normal: NormalScores | None = None
    run: Path | None = None

    def __post_init__(self) -> None:
        values = [("threshold", self.threshold), *((f"score of {image.name}", image.score) for image in self.images)]
        values += [("normal score", score) for score in (self.normal.scores if self.normal else ())]
        for name, value in values:
            if not math.isfinite(value):
                raise BKDError(f"the {name} of {self.name} is {value}: expected a finite number")
