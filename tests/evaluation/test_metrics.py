"""Metrics against scikit-learn and a brute-force AUPRO; undefined metrics, refused input, bounded memory."""

from __future__ import annotations

import errno
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage
from sklearn.metrics import auc, average_precision_score, precision_recall_curve, roc_auc_score

from bkd_fast.errors import BKDError
from bkd_fast.evaluation.metrics import (
    IMAGE_METRICS,
    METRIC_NAMES,
    PIXEL_METRICS,
    PixelMetrics,
    classification_metrics,
    image_metrics,
    image_roc,
    mean_metrics,
)
from bkd_fast.evaluation.sorted_pixels import BLOCK, _keys

Images = list[tuple[np.ndarray, np.ndarray]]


def f1_max(truth: np.ndarray, scores: np.ndarray) -> float:
    precision, recall, _ = precision_recall_curve(truth, scores)
    return max(2 * p * r / (p + r) for p, r in zip(precision, recall, strict=True) if p + r > 0)


def brute_force_aupro(images: Images, limit: float = 0.3) -> float:
    """One threshold after another, one component after another, straight from the definition."""
    values = np.unique(np.concatenate([anomaly_map.ravel() for anomaly_map, _ in images]))[::-1]
    components = []
    for index, (_, mask) in enumerate(images):
        labels, count = ndimage.label(mask, np.ones((3, 3)))
        components += [(index, labels == number) for number in range(1, count + 1)]
    normal = sum(int((~mask).sum()) for _, mask in images)
    fpr, pro = [0.0], [0.0]
    for value in values:
        fpr.append(sum(int(((anomaly_map >= value) & ~mask).sum()) for anomaly_map, mask in images) / normal)
        pro.append(float(np.mean([(images[index][0][region] >= value).mean() for index, region in components])))
    area = 0.0
    for x0, x1, y0, y1 in zip(fpr, fpr[1:], pro, pro[1:], strict=False):
        if x0 < limit and x1 > x0:
            end = min(x1, limit)
            area += (end - x0) * (y0 + y0 + (y1 - y0) * (end - x0) / (x1 - x0)) / 2
    return area / limit


def filled(images: Images) -> PixelMetrics:
    metrics = PixelMetrics()
    for anomaly_map, mask in images:
        metrics.update(anomaly_map, mask)
    return metrics


def random_images(count: int, size: tuple[int, int], seed: int, levels: int | None = None) -> Images:
    """Maps with some signal; ``levels`` quantises them so that ties are everywhere."""
    generator = np.random.default_rng(seed)
    images = []
    for index in range(count):
        mask = (generator.random(size) < 0.05) if index % 2 else np.zeros(size, bool)
        mask = ndimage.binary_dilation(mask)
        anomaly_map = (generator.normal(0, 1, size) + mask).astype(np.float32)
        if levels is not None:
            anomaly_map = np.round(anomaly_map * levels).astype(np.float32) / np.float32(levels)
        images.append((anomaly_map, mask))
    return images


def expected(images: Images) -> dict[str, float]:
    scores = np.concatenate([anomaly_map.ravel() for anomaly_map, _ in images])
    truth = np.concatenate([mask.ravel() for _, mask in images])
    computed = (
        roc_auc_score(truth, scores),
        average_precision_score(truth, scores),
        f1_max(truth, scores),
        brute_force_aupro(images),
    )
    return dict(zip(PIXEL_METRICS, computed, strict=True))


@given(
    st.lists(st.tuples(st.booleans(), st.integers(-3, 3)), min_size=2, max_size=40).filter(
        lambda rows: len({label for label, _ in rows}) == 2
    )
)
@settings(deadline=None, max_examples=50)
def test_image_metrics_with_ties_equal_scikit_learn(rows):
    truth, scores = np.array([row[0] for row in rows]), np.array([row[1] for row in rows], float)
    computed = image_metrics(truth, scores)
    assert computed["image_auroc"] == pytest.approx(roc_auc_score(truth, scores))
    assert computed["image_ap"] == pytest.approx(average_precision_score(truth, scores))
    assert computed["image_f1_max"] == pytest.approx(f1_max(truth, scores))


@pytest.mark.parametrize("labels", [[], [0, 0, 0], [1, 1, 1]])
def test_image_metrics_of_one_class_are_absent(labels):
    assert image_metrics(labels, np.arange(len(labels))) == dict.fromkeys(IMAGE_METRICS)
    assert image_roc(labels, np.arange(len(labels))) is None


def test_image_roc_has_the_area_of_the_auroc_and_few_points():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, 3000)
    scores = generator.normal(labels, 1)
    fpr, tpr = image_roc(labels, scores)
    assert len(fpr) <= 200
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1)
    assert auc(fpr, tpr) == pytest.approx(image_metrics(labels, scores)["image_auroc"], abs=5e-3)


@pytest.mark.parametrize(
    ("labels", "scores", "message"),
    [
        ([0, 1, 2], [1, 2, 3], "labels must be a flat sequence of 0 and 1"),
        ([[0, 1]], [[1, 2]], "labels must be a flat sequence"),
        ([0, 1], [1, np.nan], "score nan of image 1"),
        ([0, 1], [1, 2, 3], "expected one of each per image"),
    ],
)
def test_image_metrics_refuse_wrong_input(labels, scores, message):
    with pytest.raises(BKDError, match=message):
        image_metrics(labels, scores)


def test_classification_metrics_by_hand():
    #                       hit hit miss alarm quiet quiet quiet
    labels, decisions = [1, 1, 1, 0, 0, 0, 0], [1, 1, 0, 1, 0, 0, 0]
    assert classification_metrics(labels, decisions) == pytest.approx(
        {"precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "false_alarm_rate": 1 / 4}
    )


def test_classification_metrics_without_a_denominator_are_absent():
    nothing = dict.fromkeys(("precision", "recall", "f1", "false_alarm_rate"))
    assert classification_metrics([], []) == nothing
    assert classification_metrics([0, 0], [0, 0]) == {**nothing, "false_alarm_rate": 0}
    assert classification_metrics([1, 1], [0, 0]) == {**nothing, "recall": 0, "f1": 0}


def test_mean_metrics_leave_absent_metrics_out():
    mean = mean_metrics([{"image_auroc": 0.5, "aupro": None}, {"image_auroc": 1.0, "aupro": 0.8}, {"image_ap": None}])
    assert mean == {**dict.fromkeys(METRIC_NAMES), "image_auroc": 0.75, "aupro": 0.8}
    assert mean_metrics([]) == dict.fromkeys(METRIC_NAMES)


@pytest.mark.parametrize("levels", [1, 4, None])
def test_pixel_metrics_are_exact(levels):
    images = random_images(4, (13, 17), seed=1, levels=levels)
    assert filled(images).compute() == pytest.approx(expected(images), abs=1e-12)


FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
TIED = st.sampled_from([np.float32(v) for v in (-1.0, -0.0, 0.0, 1e-45, 1.0, 1.0000001, 2.0, 3.0)])


@given(st.data(), st.sampled_from([FINITE, TIED]))
@settings(deadline=None, max_examples=60)
def test_any_pixels_are_exact(data, values):
    shape = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 5)))
    images = [
        (
            data.draw(hnp.arrays(np.float32, shape, elements=values)),
            data.draw(hnp.arrays(np.bool_, shape, elements=st.booleans())),
        )
        for _ in range(data.draw(st.integers(1, 4)))
    ]
    with filled(images) as metrics:
        computed = metrics.compute()
    share = np.mean([mask.mean() for _, mask in images])
    if share in (0, 1):
        assert computed == dict.fromkeys(PIXEL_METRICS)
    else:
        assert computed == pytest.approx(expected(images), abs=1e-12)


def test_equal_values_that_fill_several_blocks_are_counted(monkeypatch):
    monkeypatch.setattr("bkd_fast.evaluation.sorted_pixels.BLOCK", 50)
    images = random_images(3, (20, 20), seed=2, levels=1)
    images.append((np.zeros((20, 20), np.float32), np.zeros((20, 20), bool)))
    assert filled(images).compute() == pytest.approx(expected(images), abs=1e-12)
    assert BLOCK > 50


def test_regions_that_touch_at_a_corner_are_one():
    mask = np.eye(6, dtype=bool)
    anomaly_map = np.zeros((6, 6), np.float32)
    anomaly_map[0, 0] = 1
    fpr, pro = filled([(anomaly_map, mask)]).pro()
    assert fpr[1] == 0
    assert pro[1] == pytest.approx(1 / 6)


def test_a_small_region_counts_as_much_as_a_large_one():
    mask = np.zeros((10, 10), bool)
    mask[0, 0] = mask[4:, 4:] = True
    anomaly_map = np.where(mask, np.float32(0), np.float32(0.5))
    anomaly_map[0, 0] = 1
    assert filled([(anomaly_map, mask)]).compute()["aupro"] == pytest.approx(0.5)


def test_perfect_and_inverted_maps():
    mask = np.zeros((30, 30), bool)
    mask[3:10, 3:20] = True
    perfect, inverted = filled([(mask.astype(np.float32), mask)]), filled([((~mask).astype(np.float32), mask)])
    assert perfect.compute() == pytest.approx(dict.fromkeys(PIXEL_METRICS, 1.0), abs=1e-12)
    assert max(perfect.compute().values()) <= 1
    assert inverted.compute()["pixel_auroc"] == inverted.compute()["aupro"] == 0


def test_neighbouring_floats_are_told_apart_and_zeros_are_not():
    values = np.array([-np.finfo(np.float32).max, -1.0, -1e-45, -0.0, 0.0, 1e-45, 0.1, 1.0], np.float32)
    values = np.unique(np.concatenate([values, np.nextafter(values, np.float32(9))]))
    keys = _keys(values)
    assert (np.diff(keys.astype(np.int64)) > 0).all()
    assert _keys(np.array([-0.0], np.float32)) == _keys(np.array([0.0], np.float32))
    up = np.nextafter(np.float32(1e-4), np.float32(1))
    metrics = filled([(np.array([[1e-4, up]], np.float32), np.array([[False, True]]))])
    assert metrics.compute()["pixel_auroc"] == 1


@pytest.mark.parametrize("masked", [True, False, None])
def test_pixel_metrics_that_do_not_exist_are_absent(masked):
    images = [] if masked is None else [(np.ones((4, 4), np.float32), np.full((4, 4), masked))]
    metrics = filled(images)
    assert metrics.compute() == dict.fromkeys(PIXEL_METRICS)
    assert metrics.roc() is metrics.pro() is None


def test_curves_are_short_rising_and_close_to_the_metrics():
    metrics = filled(random_images(6, (64, 64), seed=3))
    computed = metrics.compute()
    (fpr, tpr), (pro_fpr, pro) = metrics.roc(), metrics.pro()
    for x, y in ((fpr, tpr), (pro_fpr, pro)):
        assert 50 < len(x) <= 200
        assert (np.diff(x) >= 0).all()
        assert (np.diff(y) >= 0).all()
    assert auc(fpr, tpr) == pytest.approx(computed["pixel_auroc"], abs=2e-3)
    assert auc(pro_fpr, pro) / 0.3 == pytest.approx(computed["aupro"], abs=2e-3)
    assert (fpr[-1], tpr[-1], pro_fpr[-1]) == (1, 1, 0.3)


def test_images_may_be_added_after_metrics_were_asked_for():
    images = random_images(4, (9, 9), seed=4, levels=2)
    metrics = filled(images[:2])
    assert metrics.compute() == pytest.approx(expected(images[:2]), abs=1e-12)
    for image in images[2:]:
        metrics.update(*image)
    assert metrics.compute() == pytest.approx(expected(images), abs=1e-12)


def test_images_may_differ_in_size():
    images = random_images(2, (9, 14), seed=5) + random_images(2, (12, 5), seed=6)
    assert filled(images).compute() == pytest.approx(expected(images), abs=1e-12)


@pytest.mark.parametrize(
    ("anomaly_map", "mask", "message"),
    [
        (np.full((4, 4), np.nan, np.float32), np.zeros((4, 4), bool), r"image 1 .*16 of 16 values .*NaN or infinite"),
        (np.array([[0, np.inf]], np.float32), np.zeros((1, 2), bool), "image 1 .*1 of 2 values"),
        (np.zeros((4, 4), np.float32), np.zeros((4, 5), bool), r"\(4, 4\) and its mask \(4, 5\)"),
        (np.zeros(4, np.float32), np.zeros(4, bool), r"expected the same \(H, W\)"),
        (np.zeros((4, 4)), np.zeros((4, 4), bool), "expected a float32 map and a bool mask, not float64"),
        (np.zeros((4, 4), np.float32), np.zeros((4, 4), np.uint8), "not float32 and uint8"),
    ],
)
def test_unusable_maps_are_refused_by_image_and_leave_nothing_behind(anomaly_map, mask, message):
    images = random_images(2, (6, 6), seed=7)
    metrics = filled(images[:1])
    with pytest.raises(BKDError, match=message):
        metrics.update(anomaly_map, mask)
    metrics.update(*images[1])
    assert metrics.compute() == pytest.approx(expected(images), abs=1e-12)


def test_a_temporary_folder_that_cannot_be_written_is_named(tmp_path: Path):
    metrics = PixelMetrics(tmp_path / "missing")
    with pytest.raises(BKDError, match="temporary folder .*missing.*TMPDIR"):
        metrics.update(np.ones((4, 4), np.float32), np.zeros((4, 4), bool))


def test_a_disk_that_takes_half_of_a_write_loses_nothing_and_a_full_one_is_an_error(monkeypatch):
    """``write`` may take a part only, without an error."""
    images = random_images(3, (20, 20), seed=3)
    space = [10**9]
    original = tempfile.TemporaryFile

    class Short:
        def __init__(self, **options):
            self.file = original(**options)

        def write(self, data):
            taken = min(len(data), 100, space[0])
            if not taken:
                raise OSError(errno.ENOSPC, "No space left on device")
            space[0] -= taken
            return self.file.write(data[:taken])

        def __getattr__(self, name):
            return getattr(self.file, name)

    monkeypatch.setattr(tempfile, "TemporaryFile", Short)
    assert filled(images).compute() == pytest.approx(expected(images), abs=1e-12)
    space[0] = 1000
    with pytest.raises(BKDError, match="No space left"):
        filled(images)


def test_memory_does_not_grow_with_the_number_of_images(monkeypatch):
    monkeypatch.setattr("bkd_fast.evaluation.sorted_pixels.BLOCK", 2**14)
    generator = np.random.default_rng(0)
    image = 1 + generator.random((256, 256)).astype(np.float32) / 16
    mask = np.zeros((256, 256), bool)
    mask[:64] = True

    def peak(count: int) -> int:
        tracemalloc.start()
        with PixelMetrics() as metrics:
            for index in range(count):
                metrics.update(image * np.float32(1 + index / count / 16), mask)
            metrics.compute()
        _, highest = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return highest

    # 200 maps are 52 MB of float32; what is in memory is one map, one block and the histograms.
    assert peak(200) < 1.05 * peak(100) < 16e6
