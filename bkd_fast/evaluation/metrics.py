"""How well defects are found: figures per image, per decision and per pixel.

The seven figures of :data:`METRIC_NAMES` need no threshold. They are exact: every distinct score is a threshold and
equal scores are one step, as in scikit-learn. A figure that does not exist (one class only, no masks) is None, never 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike
from scipy import ndimage
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

from bkd_fast.errors import BKDError
from bkd_fast.evaluation.sorted_pixels import CHUNK, SortedPixels, ValueCounts

IMAGE_METRICS = ("image_auroc", "image_ap", "image_f1_max")
PIXEL_METRICS = ("pixel_auroc", "pixel_ap", "pixel_f1_max", "aupro")
METRIC_NAMES = IMAGE_METRICS + PIXEL_METRICS
FPR_LIMIT = 0.3
CURVE_STEPS = 98  # a curve keeps a point whenever either axis enters another of so many parts: at most 200 in all

Curve = tuple[np.ndarray, np.ndarray]


def image_metrics(labels: ArrayLike, scores: ArrayLike) -> dict[str, float | None]:
    """AUROC, average precision and the best F1 over all thresholds.

    Args:
        labels: (N,) truth, 1 or True for a defective image.
        scores: (N,) finite anomaly scores, larger is more anomalous.

    Returns:
        The three figures of :data:`IMAGE_METRICS` in 0..1, all None if the images are of one class or there are none.

    Raises:
        BKDError: labels other than 0 and 1, scores that are not finite, or lengths that differ.
    """
    truth, values = _checked(labels, scores)
    if len(np.unique(truth)) < 2:
        return dict.fromkeys(IMAGE_METRICS)
    precision, recall, _ = precision_recall_curve(truth, values)
    # The last point (precision 1, recall 0) is no threshold; at every other the sum is above 0.
    f1 = 2 * precision[:-1] * recall[:-1] / (precision[:-1] + recall[:-1]).clip(min=np.finfo(float).tiny)
    figures = (roc_auc_score(truth, values), average_precision_score(truth, values), f1.max())
    return dict(zip(IMAGE_METRICS, map(float, figures), strict=True))


def image_roc(labels: ArrayLike, scores: ArrayLike) -> Curve | None:
    """The ROC curve over images: (false positive rate, true positive rate), at most 200 points; None for one class."""
    truth, values = _checked(labels, scores)
    if len(np.unique(truth)) < 2:
        return None
    fpr, tpr, _ = roc_curve(truth, values)
    return _joined((0.0, 0.0), [_thinned(fpr, tpr, -1)], (1.0, 1.0))


def classification_metrics(labels: ArrayLike, decisions: ArrayLike) -> dict[str, float | None]:
    """What the deployed threshold does.

    Args:
        labels: (N,) truth, 1 or True for a defective image.
        decisions: (N,) 1 or True for an image called anomalous.

    Returns:
        ``precision``, ``recall``, ``f1`` and ``false_alarm_rate`` (share of good images called anomalous). A figure
        without a denominator is None: precision if nothing was called anomalous, recall and F1 without defective
        images, the false alarm rate without good ones.

    Raises:
        BKDError: values other than 0 and 1, or lengths that differ.
    """
    truth, called = _binary("labels", labels), _binary("decisions", decisions)
    _same_length(truth, called, "decisions")
    hits, alarms = int((truth & called).sum()), int((~truth & called).sum())
    defective, good = int(truth.sum()), int((~truth).sum())
    return {
        "precision": hits / (hits + alarms) if hits + alarms else None,
        "recall": hits / defective if defective else None,
        "f1": 2 * hits / (hits + alarms + defective) if defective else None,
        "false_alarm_rate": alarms / good if good else None,
    }


def mean_metrics(categories: Iterable[Mapping[str, float | None]]) -> dict[str, float | None]:
    """Each figure of :data:`METRIC_NAMES` averaged over the categories that have it; None where none has."""
    rows = list(categories)
    return {name: mean_of(row.get(name) for row in rows) for name in METRIC_NAMES}


def mean_of(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are not None; None if there are none."""
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


def percent(value: float | None) -> str:
    """A figure as tables of text show it."""
    return "–" if value is None else f"{100 * value:.1f}"


class PixelMetrics:
    """Pixel figures of one test set, image after image, exact and in bounded memory.

    Pixel AUROC, AP and best F1 are those of scikit-learn over all pixels. AUPRO is that of MVTec AD (Bergmann et al.,
    IJCV 2021): the share of each 8-connected defect region that is found, averaged over the regions of all images,
    against the share of false pixels among all normal ones, integrated up to 0.3 and divided by 0.3.

    Args:
        chunk: pixels of each kind (normal, defective) in memory at once; the rest is in a temporary file.
        folder: where that file goes: 2 bytes a normal pixel, 8 a defective one (400 MB for 3,000 images of 256 x 256).
    """

    def __init__(self, chunk: int = CHUNK, folder: str | Path | None = None) -> None:
        self._pixels = SortedPixels(chunk, folder)
        self._images = self._normal = self._defect = self._components = 0
        self._sweep: _Sweep | None = None

    def update(self, anomaly_map: np.ndarray, mask: np.ndarray) -> None:
        """Adds one image: its anomaly map (H, W) float32 and its true mask (H, W) bool, all False for a good image.

        A defective image whose mask is unknown must be left out.

        Raises:
            BKDError: another dtype or shape, or values that are not finite; nothing is added then.
        """
        which = f"image {self._images} (counted from 0)"
        if anomaly_map.dtype != np.float32 or mask.dtype != np.bool_:
            raise BKDError(
                f"{which}: expected a float32 anomaly map and a bool mask, not {anomaly_map.dtype} and {mask.dtype}"
            )
        if anomaly_map.ndim != 2 or anomaly_map.shape != mask.shape:
            raise BKDError(
                f"{which}: the anomaly map is {anomaly_map.shape} and its mask {mask.shape}: expected the same (H, W)"
            )
        wrong = anomaly_map.size - int(np.isfinite(anomaly_map).sum())
        if wrong:
            raise BKDError(f"{which}: {wrong} of {anomaly_map.size} values of the anomaly map are NaN or infinite")
        regions, count = ndimage.label(mask, np.ones((3, 3), int)) if mask.any() else (np.zeros(mask.shape, int), 0)
        area = np.bincount(regions.ravel(), minlength=1)[regions[mask]]
        self._pixels.add(anomaly_map[~mask], anomaly_map[mask], area)
        self._images += 1
        self._defect += len(area)
        self._normal += mask.size - len(area)
        self._components += count
        self._sweep = None

    def compute(self) -> dict[str, float | None]:
        """The four figures of :data:`PIXEL_METRICS` in 0..1, all None without defective or without normal pixels."""
        sweep = self._swept()
        return dict.fromkeys(PIXEL_METRICS) if sweep is None else dict(zip(PIXEL_METRICS, sweep.figures(), strict=True))

    @property
    def f1_max_threshold(self) -> float | None:
        """The value v such that "anomalous where the map is at least v" has the best F1 (the largest of several)."""
        sweep = self._swept()
        return None if sweep is None else sweep.best_threshold

    def roc(self) -> Curve | None:
        """(false positive rate, true positive rate) over pixels, at most 200 points of the exact curve."""
        sweep = self._swept()
        return None if sweep is None else _joined((0.0, 0.0), sweep.roc, (1.0, 1.0))

    def pro(self) -> Curve | None:
        """(false positive rate, mean overlap per region) up to the limit of 0.3, at most 200 points."""
        sweep = self._swept()
        return None if sweep is None else _joined((0.0, 0.0), sweep.pro, (FPR_LIMIT, sweep.pro_at_limit))

    def close(self) -> None:
        """Drops the pixels and their file; figures that were computed stay."""
        self._pixels.close()

    def __enter__(self) -> PixelMetrics:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _swept(self) -> _Sweep | None:
        if self._sweep is None and self._normal and self._defect:
            sweep = _Sweep(self._normal, self._defect, self._components)
            for values in self._pixels.falling():
                sweep.lower(values)
            self._sweep = sweep
        return self._sweep


class _Sweep:
    """Every pixel figure, while the threshold falls from above the largest value to the smallest."""

    def __init__(self, normal: int, defect: int, components: int) -> None:
        self.totals = normal, defect, components
        self.false, self.true, self.overlap = 0, 0, 0.0  # pixels at or above the threshold, and their overlap, so far
        self.auroc = self.ap = self.pro_area = 0.0
        self.best_f1, self.best_threshold = -1.0, 0.0
        self.pro_at_limit: float = 1.0
        self.roc: list[Curve] = []
        self.pro: list[Curve] = []
        self.last_parts = [0, 0]

    def lower(self, step: ValueCounts) -> None:
        """Takes the threshold down through ``step``'s values, one after the other."""
        normal, defect, components = self.totals
        false, true = self.false + np.cumsum(step.normal), self.true + np.cumsum(step.defect)
        overlap = self.overlap + np.cumsum(step.overlap)

        self.auroc += float(np.sum(step.normal * (true - step.defect / 2))) / normal / defect
        self.ap += float(np.sum(step.defect * (true / (true + false)))) / defect
        f1 = 2 * true / (true + false + defect)
        best = int(np.argmax(f1))
        if f1[best] > self.best_f1:
            self.best_f1, self.best_threshold = float(f1[best]), float(step.value[best])

        fpr, pro = false / normal, overlap / components
        self._add_pro(np.concatenate([[self.false / normal], fpr]), np.concatenate([[self.overlap / components], pro]))
        self._keep(self.roc, 0, fpr, true / defect, 1.0)
        inside = fpr < FPR_LIMIT
        self._keep(self.pro, 1, fpr[inside], pro[inside], FPR_LIMIT)
        self.false, self.true, self.overlap = int(false[-1]), int(true[-1]), float(overlap[-1])

    def figures(self) -> tuple[float, ...]:
        # Sums of many fractions: a perfect map may come out a rounding error above 1.
        return tuple(min(figure, 1.0) for figure in (self.auroc, self.ap, self.best_f1, self.pro_area / FPR_LIMIT))

    def _add_pro(self, x: np.ndarray, y: np.ndarray) -> None:
        """Adds the area under a piece of the curve up to the limit, interpolating in the step that crosses it."""
        if x[0] >= FPR_LIMIT:
            return
        crossing = int(np.searchsorted(x, FPR_LIMIT))
        if crossing < len(x):
            self.pro_at_limit = float(
                np.interp(FPR_LIMIT, x[crossing - 1 : crossing + 1], y[crossing - 1 : crossing + 1])
            )
            x, y = np.append(x[:crossing], FPR_LIMIT), np.append(y[:crossing], self.pro_at_limit)
        self.pro_area += float(np.sum(np.diff(x) * (y[1:] + y[:-1]) / 2))

    def _keep(self, points: list[Curve], which: int, x: np.ndarray, y: np.ndarray, width: float) -> None:
        if len(x):
            points.append(_thinned(x, y, self.last_parts[which], width))
            self.last_parts[which] = int(_parts(x[-1:], y[-1:], width)[0])


def _parts(x: np.ndarray, y: np.ndarray, width: float) -> np.ndarray:
    """How many parts of either axis a rising curve has entered."""
    return np.floor(x / width * CURVE_STEPS) + np.floor(np.minimum(y, 1.0) * CURVE_STEPS)


def _thinned(x: np.ndarray, y: np.ndarray, last: int, width: float = 1.0) -> Curve:
    """The points where the curve enters another part of an axis; ``last``: the parts entered before the first point."""
    parts = _parts(x, y, width)
    kept = np.diff(parts, prepend=last) > 0
    return x[kept], y[kept]


def _joined(start: tuple[float, float], pieces: Sequence[Curve], end: tuple[float, float]) -> Curve:
    x = np.concatenate([[start[0]], *(piece[0] for piece in pieces), [end[0]]])
    y = np.concatenate([[start[1]], *(piece[1] for piece in pieces), [end[1]]])
    new = np.append(True, (np.diff(x) > 0) | (np.diff(y) > 0))
    return x[new], y[new]


def _checked(labels: ArrayLike, scores: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    truth, values = _binary("labels", labels), np.asarray(scores, dtype=np.float64)
    _same_length(truth, values, "scores")
    if not np.isfinite(values).all():
        raise BKDError(
            f"score {values[~np.isfinite(values)][0]} of image {np.argmin(np.isfinite(values))} is not a finite number"
        )
    return truth, values


def _binary(name: str, values: ArrayLike) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != 1 or not np.isin(array, (0, 1)).all():
        raise BKDError(
            f"{name} must be a flat sequence of 0 and 1, not shape {array.shape} with values {np.unique(array)[:5]}"
        )
    return array.astype(bool)


def _same_length(truth: np.ndarray, other: np.ndarray, name: str) -> None:
    if truth.shape != other.shape:
        raise BKDError(f"labels are {truth.shape} and {name} {other.shape}: expected one of each per image")
