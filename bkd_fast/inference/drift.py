"""Drift: whether images are still like those that a run was calibrated with. It observes, and changes no score."""

from __future__ import annotations

import logging
import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bkd_fast.artifact import Calibration
from bkd_fast.data.inputs import ImageLike
from bkd_fast.decisions import threshold_for
from bkd_fast.errors import BKDError
from bkd_fast.inference.detector import Detector
from bkd_fast.inference.prediction import Prediction, Predictor, Preprocessed, RawPrediction
from bkd_fast.inference.tiling import TiledDetector
from bkd_fast.model.ambient import settled
from bkd_fast.model.calibration import level_statistics

log = logging.getLogger("bkd_fast")
SHARE, P_VALUES = "share above the threshold", "p-values"
MAX_DISTANCE = 0.2  # between the distributions of p-values; less is no drift however sure it is
CLIP = 4.0  # stds; beyond them a single image, such as a defect, counts no more
SMALLEST = 12  # images that are tested
EVERY = 8  # images of which one is encoded again where the network is one program


@dataclass(frozen=True)
class Shift:
    """How far a statistic is from that of the normal images: ``value`` in ``low`` to ``high``, drift above ``limit``.

    ``statistic``: SHARE, a share of images; P_VALUES, the Kolmogorov-Smirnov distance of the scores up to the threshold
    from those of the normal images; or one of the teacher, such as ``level 1 offset``, in stds of the normal images.
    """

    statistic: str
    value: float
    low: float
    high: float
    limit: float

    @property
    def excess(self) -> float:
        """How much of the interval's closer end is beyond the limit; drift where it is positive."""
        return max(self.low, -self.high) - self.limit

    def sentence(self) -> str:
        """Return the shift in words."""
        if self.statistic == SHARE:
            return f"{self.value:.0%} of the images are above the threshold (at least {self.low:.0%})"
        if self.statistic == P_VALUES:
            return f"the scores of normal images have moved by {self.value:.2f} (Kolmogorov-Smirnov distance)"
        return (
            f"the teacher's {self.statistic} has moved by {self.value:+.1f} std ({self.low:+.1f} to {self.high:+.1f})"
        )


@dataclass(frozen=True)
class Drift:
    """What moved, most certain first; since which image, and at which it was seen, counted from 1."""

    shifts: tuple[Shift, ...]
    since: int
    image: int

    def sentence(self) -> str:
        """Return what moved, since when, and what to do."""
        others = len(self.shifts) - 1
        also = f", and {others} other statistic{'s' if others > 1 else ''}" if others else ""
        return (
            f"drift since about image {self.since}, seen at image {self.image}: {self.shifts[0].sentence()}{also}. "
            "Check light, lens and camera. If the parts are good all the same, set new thresholds with "
            "`bkd-fast calibrate RUN GOOD_IMAGES`, or learn them with `bkd-fast update RUN GOOD_IMAGES`."
        )


class DriftMonitor:
    """Follows the last images of a line, and says once when they are no longer like the normal images of the run.

    Three kinds of statistics are compared with the run's: the share of images above the threshold (Clopper-Pearson
    interval), the scores up to the threshold (two-sample Kolmogorov-Smirnov; defects do not count), and the teacher's
    (difference of means in stds, Student's t). Each is tested over the last 12 images and over more, up to ``window``.
    It has drifted where its whole confidence interval is beyond what is tolerated.

    Args:
        calibration: of a run. One without teacher statistics is followed by its scores alone.
        window: the most images that are looked back at.
        defect_rate: share of anomalous images that is usual on the line; false alarms come on top.
        tolerance: shift of a teacher statistic that is no drift, in stds of the normal images.
        risk: of each test to be wrong; small, since every image is tested several times.

    Raises:
        BKDError: an option out of its range.
    """

    def __init__(
        self,
        calibration: Calibration,
        *,
        window: int = 200,
        defect_rate: float = 0.05,
        tolerance: float = 1.0,
        risk: float = 1e-6,
    ) -> None:
        if window < SMALLEST:
            raise BKDError(f"drift: the window is {window} images, expected at least {SMALLEST}")
        if not 0 <= defect_rate < 1 or not 0 < risk < 1 or not tolerance >= 0:
            given = f"defect_rate is {defect_rate}, risk {risk} and tolerance {tolerance}"
            raise BKDError(f"drift: {given}: expected shares below 1 and a tolerance of at least 0")
        from scipy.special import stdtrit  # here, since a detector needs none of it

        self.threshold, self.tolerance, self.risk = calibration.threshold, tolerance, risk
        false_alarms = threshold_for(calibration.scores, calibration.false_alarms).upper
        self.max_share = min(false_alarms + defect_rate, 1.0)
        scores = np.array(calibration.scores, float)
        self.normal = np.sort(scores[scores <= self.threshold])
        self.names = list(calibration.teacher)
        reference = np.array([*calibration.teacher.values()], float).reshape(-1, 2)
        self.mean = reference[:, 0]
        # Shifts of less than 0.1 % are rounding, such as that of features in half precision.
        self.std = np.maximum(reference[:, 1], 1e-3 * np.abs(self.mean) + 1e-9)
        self.count = len(scores)
        self.quantile = float(stdtrit(max(self.count - 1, 1), 1 - risk / 2))
        self.sizes = sorted({max(SMALLEST, window >> step) for step in range(5)})
        self.scores: deque[float] = deque(maxlen=window)
        self.stds: deque[np.ndarray] = deque(maxlen=window)  # NaN where an image has none
        self.images = 0
        self.drift: Drift | None = None
        self.lock = threading.Lock()

    def update(self, score: float, statistics: Sequence[float] | np.ndarray | None = None) -> Drift | None:
        """Take the next image; return the drift when it is first seen, else None.

        Args:
            score: raw, as in :class:`Prediction`.
            statistics: of :func:`bkd_fast.model.calibration.level_statistics`, in its order; None where not known.
        """
        known = statistics is not None and len(self.names)
        row = (np.asarray(statistics, float) - self.mean) / self.std if known else np.full(len(self.names), np.nan)
        with self.lock:
            self.scores.append(score)
            self.stds.append(np.clip(row, -CLIP, CLIP))
            self.images += 1
            if self.drift is not None:
                return None
            scores, stds = np.array(self.scores), np.array(self.stds)
        sizes = [size for size in self.sizes if size <= len(scores)]
        found = [shift for size in sizes for shift in self._shifts(scores[-size:], stds[-size:]) if shift.excess > 0]
        if not found:
            return None
        strongest: dict[str, Shift] = {}
        for shift in sorted(found, key=lambda shift: -shift.excess):
            strongest.setdefault(shift.statistic, shift)
        shifts = sorted(strongest.values(), key=lambda shift: -shift.excess / max(shift.limit, 1e-9))
        self.drift = Drift(tuple(shifts), self.images - len(scores) + self._onset(shifts[0], scores, stds), self.images)
        return self.drift

    def shifts(self) -> list[Shift]:
        """Return every statistic over the window, as far as it is known."""
        with self.lock:
            scores, stds = np.array(self.scores), np.array(self.stds)
        return self._shifts(scores, stds) if len(scores) else []

    def reset(self) -> None:
        """Forget the images seen, so that the next drift is said again."""
        with self.lock:
            self.scores.clear()
            self.stds.clear()
            self.drift = None

    def _shifts(self, scores: np.ndarray, stds: np.ndarray) -> list[Shift]:
        from scipy.special import betaincinv

        above, count = int((scores > self.threshold).sum()), len(scores)
        low = float(betaincinv(above, count - above + 1, self.risk)) if above else 0.0
        high = float(betaincinv(above + 1, count - above, 1 - self.risk)) if above < count else 1.0
        shifts = [Shift(SHARE, above / count, low, high, self.max_share)]
        usual = np.sort(scores[scores <= self.threshold])
        if len(usual) and len(self.normal):
            both = np.concatenate([usual, self.normal])
            ranks, expected = (np.searchsorted(part, both, "right") / len(part) for part in (usual, self.normal))
            distance = float(np.abs(ranks - expected).max())
            # The first term of Kolmogorov's distribution, solved for the distance.
            width = math.sqrt(-0.5 * math.log(self.risk / 2) * (1 / len(usual) + 1 / len(self.normal)))
            shifts.append(Shift(P_VALUES, distance, distance - width, distance + width, MAX_DISTANCE))
        known = stds[~np.isnan(stds).any(1)]
        if len(self.names) and len(known):
            width = self.quantile * math.sqrt(1 / len(known) + 1 / self.count)
            for name, value in zip(self.names, known.mean(0).tolist(), strict=True):
                shifts.append(Shift(name, value, value - width, value + width, self.tolerance))
        return shifts

    def _onset(self, shift: Shift, scores: np.ndarray, stds: np.ndarray) -> int:
        """Return the number of the image in the window since which the shift best explains it (CUSUM), from 1."""
        if shift.statistic == SHARE:
            evidence = (scores > self.threshold) - (self.max_share + shift.value) / 2
        else:
            if shift.statistic == P_VALUES:
                moved = np.searchsorted(self.normal, scores) / len(self.normal) - 0.5
                moved[scores > self.threshold] = 0
            else:
                moved = np.nan_to_num(stds[:, self.names.index(shift.statistic)])
            # Half of the mean of the last images is where a normal and a moved one are as likely.
            recent = moved[-SMALLEST:].mean()
            evidence = np.sign(recent) * moved - abs(recent) / 2
        return int(evidence[::-1].cumsum()[::-1].argmax()) + 1


class Observed(Predictor[Any]):
    """A predictor whose images' scores and teacher statistics are given to a function, in the order of the images.

    Where the network is one program (a GPU's CUDA graph, ``compile``), some whole images are encoded again for their
    statistics, and tiles have none.

    Args:
        detector: whose network predicts; no other thread may use it meanwhile.
        predictor: of :meth:`Detector.predictor`.
        observe: is given each raw score, and the statistics (5 L,) or None.
        every: of how many images one is encoded again.
    """

    def __init__(
        self,
        detector: Detector,
        predictor: Detector | TiledDetector,
        observe: Callable[[float, np.ndarray | None], None],
        every: int = EVERY,
    ) -> None:
        self.every = every
        self.detector, self.predictor, self.observe, self.batch = detector, predictor, observe, predictor.batch
        self.predicted = 0

    def preprocess(self, image: ImageLike) -> Any:
        """See :meth:`Predictor.preprocess`."""
        return self.predictor.preprocess(image)

    def predict(self, batch: Sequence[Any]) -> list[RawPrediction]:
        """Return the raw predictions, and give them to the observer."""
        tiled = isinstance(self.predictor, TiledDetector)
        # The tiles of one image are its statistics' mean: images go one by one, as they do anyway.
        parts = [[each] for each in batch] if tiled else [batch]
        return [raw for part in parts for raw in self._predict(part, tiled)]

    def postprocess(self, raw: RawPrediction) -> Prediction:
        """See :meth:`Predictor.postprocess`."""
        return self.predictor.postprocess(raw)

    @settled(inference=True)
    def _predict(self, batch: Sequence[Any], tiled: bool) -> list[RawPrediction]:
        seen: list[Tensor] = []
        predictor: Predictor[Any] = self.predictor
        if self.detector.is_eager:
            hook = self.detector.model.teacher.register_forward_hook(
                lambda _module, _images, levels: seen.append(level_statistics(levels).cpu())
            )
            try:
                raws = predictor.predict(batch)
            finally:
                hook.remove()
        else:
            raws = predictor.predict(batch)
        rows: list[np.ndarray | None] = [None] * len(raws)
        if seen:
            found = torch.cat(seen)
            rows = [*(found.mean(0, keepdim=True) if tiled else found).numpy()]
        elif not tiled:
            for index in range(-self.predicted % self.every, len(batch), self.every):
                image: Preprocessed = batch[index]
                rows[index] = level_statistics(self.detector.levels(image.input[None]))[0].cpu().numpy()
        self.predicted += len(raws)
        for raw, row in zip(raws, rows, strict=True):
            self.observe(raw.score, row)
        return raws


def watch(detector: Detector, predictor: Detector | TiledDetector, monitor: DriftMonitor) -> Observed:
    """Return a predictor whose images a monitor follows; drift is logged as a warning, once."""
    if not monitor.names:
        log.warning("the run has no statistics of its teacher to watch: `bkd-fast calibrate RUN GOOD_IMAGES` adds them")

    def observe(score: float, statistics: np.ndarray | None) -> None:
        drift = monitor.update(score, statistics)
        if drift is not None:
            log.warning("%s", drift.sentence())

    return Observed(detector, predictor, observe)
