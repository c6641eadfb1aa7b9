"""Metrics of images, decisions and pixels.

The seven metrics of :data:`METRIC_NAMES` need no threshold. They are exact: each distinct score is a threshold, and
equal scores are one step, as in scikit-learn. An undefined metric (only one class, no masks) is None, never 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike
from scipy import ndimage

from bkd_fast.errors import BKDError
from bkd_fast.evaluation.sorted_pixels import SortedPixels, ValueCounts

IMAGE_METRICS = ("image_auroc", "image_ap", "image_f1_max")
PIXEL_METRICS = ("pixel_auroc", "pixel_ap", "pixel_f1_max", "aupro")
METRIC_NAMES = IMAGE_METRICS + PIXEL_METRICS
FPR_LIMIT = 0.3
ABSENT = "–"  # an undefined metric in tables
CURVE_STEPS = 98  # a curve keeps the first point in each of this many bins of either axis: at most 200 points

Curve = tuple[np.ndarray, np.ndarray]


def image_metrics(labels: ArrayLike, scores: ArrayLike) -> dict[str, float | None]:
    """Return AUROC, average precision and the best F1 over all thresholds.

    Args:
        labels: (N,) ground truth, 1 or True for a defective image.
        scores: (N,) finite anomaly scores; higher is more anomalous.

    Returns:
        The :data:`IMAGE_METRICS` in 0..1; all None without images of both classes.

    Raises:
        BKDError: labels other than 0 and 1, scores that are not finite, or different lengths.
    """
    from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score  # here: 1.4 s to load

    truth, values = _checked(labels, scores)
    if len(np.unique(truth)) < 2:
        return dict.fromkeys(IMAGE_METRICS)
    precision, recall, _ = precision_recall_curve(truth, values)
    # The last point (precision 1, recall 0) is not a threshold. At all others the sum is positive.
    f1 = 2 * precision[:-1] * recall[:-1] / (precision[:-1] + recall[:-1]).clip(min=np.finfo(float).tiny)
    metrics = (roc_auc_score(truth, values), average_precision_score(truth, values), f1.max())
    return dict(zip(IMAGE_METRICS, map(float, metrics), strict=True))


def image_roc(labels: ArrayLike, scores: ArrayLike) -> Curve | None:
    """Return the ROC curve over images, (false positive rate, true positive rate); None without both classes.

    It has at most 200 points. Raises as :func:`image_metrics`.
    """
    from sklearn.metrics import roc_curve

    truth, values = _checked(labels, scores)
    if len(np.unique(truth)) < 2:
        return None
    fpr, tpr, _ = roc_curve(truth, values)
    return _joined((0.0, 0.0), [_thinned(fpr, tpr, -1)], (1.0, 1.0))


def classification_metrics(labels: ArrayLike, decisions: ArrayLike) -> dict[str, float | None]:
    """Return the metrics of decisions.

    Args:
        labels: (N,) ground truth, 1 or True for a defective image.
        decisions: (N,) 1 or True for an image predicted anomalous.

    Returns:
        ``precision``, ``recall``, ``f1`` and ``false_alarm_rate`` (share of good images predicted anomalous), in 0..1.
        A metric without a denominator is None: precision if nothing is predicted anomalous, recall and F1 without
        defective images, the false alarm rate without good images.

    Raises:
        BKDError: values other than 0 and 1, or different lengths.
    """
    truth, decided = _binary("labels", labels), _binary("decisions", decisions)
    _same_length(truth, decided, "decisions")
    hits, alarms = int((truth & decided).sum()), int((~truth & decided).sum())
    defective, good = int(truth.sum()), int((~truth).sum())
    return {
        "precision": hits / (hits + alarms) if hits + alarms else None,
        "recall": hits / defective if defective else None,
        "f1": 2 * hits / (hits + alarms + defective) if defective else None,
        "false_alarm_rate": alarms / good if good else None,
    }


def mean_metrics(categories: Iterable[Mapping[str, float | None]]) -> dict[str, float | None]:
    """Return each of :data:`METRIC_NAMES` averaged over the categories that have it; None if none has."""
    rows = list(categories)
    return {name: mean_of(row.get(name) for row in rows) for name in METRIC_NAMES}


def mean_of(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are not None; None if there are none."""
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


def percent(value: float | None) -> str:
    """Return a metric in percent with one decimal, or :data:`ABSENT`."""
    return ABSENT if value is None else f"{100 * value:.1f}"


class PixelMetrics:
    """Pixel metrics of one test set, accumulated image by image, exact and in bounded memory.

    Pixel AUROC, AP and best F1 equal scikit-learn's over all pixels. AUPRO is that of MVTec AD (Bergmann et al., IJCV
    2021): the overlap with each 8-connected defect region, averaged over the regions of all images, against the pixel
    false positive rate, integrated up to 0.3 and divided by 0.3.

    Args:
        folder: folder of the temporary file; None: the system's. It takes 4 bytes per normal and 8 per defective pixel
            (800 MB for 3,000 images of 256 x 256).
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self._pixels = SortedPixels(folder)
        self._images = self._normal = self._defect = self._components = 0
        self._sweep: _Sweep | None = None

    def update(self, anomaly_map: np.ndarray, mask: np.ndarray, roi: np.ndarray | None = None) -> None:
        """Add one image: its anomaly map (H, W) float32 and its ground truth (H, W) bool, all False for a good image.

        Leave out defective images without a mask. Pixels outside ``roi`` (H, W) bool count as neither.

        Raises:
            BKDError: another dtype or shape, or values that are not finite; then nothing is added.
        """
        which = f"image {self._images} (counted from 0)"
        if anomaly_map.dtype != np.float32 or mask.dtype != np.bool_:
            raise BKDError(f"{which}: expected a float32 map and a bool mask, not {anomaly_map.dtype} and {mask.dtype}")
        if anomaly_map.ndim != 2 or anomaly_map.shape != mask.shape:
            raise BKDError(f"{which}: map {anomaly_map.shape} and its mask {mask.shape}: expected the same (H, W)")
        wrong = anomaly_map.size - int(np.isfinite(anomaly_map).sum())
        if wrong:
            raise BKDError(f"{which}: {wrong} of {anomaly_map.size} values of the anomaly map are NaN or infinite")
        inside = np.ones_like(mask) if roi is None else roi
        mask = mask & inside
        regions, count = ndimage.label(mask, np.ones((3, 3), int)) if mask.any() else (np.zeros(mask.shape, int), 0)
        area = np.bincount(regions.ravel(), minlength=1)[regions[mask]]
        self._pixels.add(anomaly_map[inside & ~mask], anomaly_map[mask], area)
        self._images += 1
        self._defect += len(area)
        self._normal += int(inside.sum()) - len(area)
        self._components += count
        self._sweep = None

    def compute(self) -> dict[str, float | None]:
        """Return the :data:`PIXEL_METRICS` in 0..1; all None without both defective and normal pixels."""
        sweep = self._swept()
        return dict.fromkeys(PIXEL_METRICS) if sweep is None else dict(zip(PIXEL_METRICS, sweep.metrics(), strict=True))

    def roc(self) -> Curve | None:
        """Return at most 200 points of the exact ROC curve, (false positive rate, true positive rate) over pixels."""
        sweep = self._swept()
        return None if sweep is None else _joined((0.0, 0.0), sweep.roc, (1.0, 1.0))

    def pro(self) -> Curve | None:
        """Return at most 200 points of (false positive rate, mean overlap per region), up to a rate of 0.3."""
        sweep = self._swept()
        return None if sweep is None else _joined((0.0, 0.0), sweep.pro, (FPR_LIMIT, sweep.pro_at_limit))

    def close(self) -> None:
        """Delete the pixels and their file; computed metrics stay."""
        self._pixels.close()

    def __enter__(self) -> PixelMetrics:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _swept(self) -> _Sweep | None:
        if self._sweep is None and self._normal and self._defect:
            sweep = _Sweep(self._normal, self._defect, self._components)
            for values in self._pixels.descending():
                sweep.lower(values)
            self._sweep = sweep
        return self._sweep


class _Sweep:
    """All pixel metrics, accumulated while the threshold falls from the largest value to the smallest."""

    def __init__(self, normal: int, defect: int, components: int) -> None:
        self.totals = normal, defect, components
        self.false, self.true, self.overlap = 0, 0, 0.0  # pixels at or above the threshold, and their overlap
        self.auroc = self.ap = self.pro_area = 0.0
        self.best_f1 = -1.0
        self.pro_at_limit: float = 1.0
        self.roc: list[Curve] = []
        self.pro: list[Curve] = []
        self.last_bins = [0, 0]

    def lower(self, step: ValueCounts) -> None:
        """Lower the threshold through the values of ``step``, in order."""
        normal, defect, components = self.totals
        false, true = self.false + np.cumsum(step.normal), self.true + np.cumsum(step.defect)
        overlap = self.overlap + np.cumsum(step.overlap)

        self.auroc += float(np.sum(step.normal * (true - step.defect / 2))) / normal / defect
        self.ap += float(np.sum(step.defect * (true / (true + false)))) / defect
        self.best_f1 = max(self.best_f1, float(np.max(2 * true / (true + false + defect))))

        fpr, pro = false / normal, overlap / components
        self._add_pro(np.concatenate([[self.false / normal], fpr]), np.concatenate([[self.overlap / components], pro]))
        self._keep(self.roc, 0, fpr, true / defect, 1.0)
        inside = fpr < FPR_LIMIT
        self._keep(self.pro, 1, fpr[inside], pro[inside], FPR_LIMIT)
        self.false, self.true, self.overlap = int(false[-1]), int(true[-1]), float(overlap[-1])

    def metrics(self) -> tuple[float, ...]:
        # Rounding in sums of many fractions can raise a perfect result above 1.
        return tuple(min(metric, 1.0) for metric in (self.auroc, self.ap, self.best_f1, self.pro_area / FPR_LIMIT))

    def _add_pro(self, x: np.ndarray, y: np.ndarray) -> None:
        """Add the area under a piece of the curve up to the limit, interpolating in the step that crosses it."""
        if x[0] >= FPR_LIMIT:
            return
        crossing = int(np.searchsorted(x, FPR_LIMIT))
        if crossing < len(x):
            step = slice(crossing - 1, crossing + 1)
            self.pro_at_limit = float(np.interp(FPR_LIMIT, x[step], y[step]))
            x, y = np.append(x[:crossing], FPR_LIMIT), np.append(y[:crossing], self.pro_at_limit)
        self.pro_area += float(np.sum(np.diff(x) * (y[1:] + y[:-1]) / 2))

    def _keep(self, points: list[Curve], which: int, x: np.ndarray, y: np.ndarray, width: float) -> None:
        if len(x):
            points.append(_thinned(x, y, self.last_bins[which], width))
            self.last_bins[which] = int(_bins(x[-1:], y[-1:], width)[0])


def _bins(x: np.ndarray, y: np.ndarray, width: float) -> np.ndarray:
    """Return how many bins of the two axes a rising curve has entered at each point."""
    return np.floor(x / width * CURVE_STEPS) + np.floor(np.minimum(y, 1.0) * CURVE_STEPS)


def _thinned(x: np.ndarray, y: np.ndarray, last: int, width: float = 1.0) -> Curve:
    """Return the points where the curve enters a new bin; ``last``: the bins entered before the first point."""
    kept = np.diff(_bins(x, y, width), prepend=last) > 0
    return x[kept], y[kept]


def _joined(start: tuple[float, float], pieces: Sequence[Curve], end: tuple[float, float]) -> Curve:
    """Return one curve from ``start`` through the pieces to ``end``, without repeated points."""
    x = np.concatenate([[start[0]], *(piece[0] for piece in pieces), [end[0]]])
    y = np.concatenate([[start[1]], *(piece[1] for piece in pieces), [end[1]]])
    new = np.append(True, (np.diff(x) > 0) | (np.diff(y) > 0))
    return x[new], y[new]


def _checked(labels: ArrayLike, scores: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    truth, values = _binary("labels", labels), np.asarray(scores, dtype=np.float64)
    _same_length(truth, values, "scores")
    if not np.isfinite(values).all():
        raise BKDError(f"score {values[~np.isfinite(values)][0]} of image {np.argmin(np.isfinite(values))}: not finite")
    return truth, values


def _binary(name: str, values: ArrayLike) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != 1 or not np.isin(array, (0, 1)).all():
        raise BKDError(f"{name} must be a flat sequence of 0 and 1: {array.shape}, {np.unique(array)[:5]}")
    return array.astype(bool)


def _same_length(truth: np.ndarray, other: np.ndarray, name: str) -> None:
    if truth.shape != other.shape:
        raise BKDError(f"labels are {truth.shape} and {name} {other.shape}: expected one of each per image")
