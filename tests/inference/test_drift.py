"""Drift: what is seen, how soon, what is not, and that it changes nothing."""

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bkd_fast.artifact import Calibration, load_trained, write_manifest
from bkd_fast.cli import main
from bkd_fast.data import load_image
from bkd_fast.decisions import NormalScores
from bkd_fast.errors import BKDError
from bkd_fast.evaluation.calibrate import calibrate
from bkd_fast.files import MANIFEST
from bkd_fast.inference.detector import Detector
from bkd_fast.inference.drift import P_VALUES, SHARE, DriftMonitor, Observed, watch
from bkd_fast.model.calibration import LEVEL_STATISTICS, level_statistics, statistics_of

NAMES = ["level 1 mean", "level 1 std"]


def calibration(seed=0, count=200, false_alarms=0.01):
    generator = np.random.default_rng(seed)
    scores = generator.normal(size=count).tolist()
    teacher = statistics_of(torch.from_numpy(np.pad(generator.normal(size=(count, 2)), ((0, 0), (0, 3)))))
    return Calibration.of(
        NormalScores("leave-one-out", scores, scores), 0.1, false_alarms, {name: teacher[name] for name in NAMES}
    )


def follow(monitor, scores, statistics):
    """Return the drift, and how often it was said."""
    said = [drift for drift in map(monitor.update, scores, statistics) if drift is not None]
    return monitor.drift, len(said)


@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_said_of_images_like_the_normal_ones(seed):
    generator = np.random.default_rng(100 + seed)
    scores, statistics = generator.normal(size=3000), generator.normal(size=(3000, 2))
    defects = generator.random(3000) < 0.03  # as usual on the line
    scores[defects], statistics[defects] = 50, 9
    drift, said = follow(DriftMonitor(calibration(seed)), scores, statistics)
    assert (drift, said) == (None, 0)


def test_each_kind_of_drift_is_said_once_with_its_statistic_and_its_beginning():
    generator = np.random.default_rng(7)
    start, count = 500, 1000
    for name, change, within in (
        (SHARE, lambda scores, _: scores.__iadd__(8), 20),
        (P_VALUES, lambda scores, _: scores.__iadd__(-2), 60),
        ("level 1 mean", lambda _, statistics: statistics[:, 0].__iadd__(3), 40),
        ("level 1 std", lambda _, statistics: statistics[:, 1].__iadd__(-3), 40),
    ):
        scores, statistics = generator.normal(size=count), generator.normal(size=(count, 2))
        change(scores[start:], statistics[start:])
        drift, said = follow(DriftMonitor(calibration()), scores, statistics)
        assert said == 1, name
        assert drift.shifts[0].statistic == name
        assert abs(drift.since - start - 1) <= 10, drift
        assert start < drift.image <= start + within, drift
        assert f"since about image {drift.since}, seen at image {drift.image}" in drift.sentence()
        assert "bkd-fast calibrate" in drift.sentence()
        assert "bkd-fast update" in drift.sentence()


def test_a_shift_within_the_tolerance_is_no_drift():
    generator = np.random.default_rng(3)
    scores, statistics = generator.normal(size=2000), generator.normal(size=(2000, 2))
    statistics[:, 0] += 0.8
    assert follow(DriftMonitor(calibration()), scores, statistics) == (None, 0)
    drift, _ = follow(DriftMonitor(calibration(), tolerance=0.1), scores, statistics)
    assert drift.shifts[0].statistic == "level 1 mean"


def test_few_normal_images_make_it_less_sure():
    generator = np.random.default_rng(5)
    scores, statistics = generator.normal(size=300), generator.normal(size=(300, 2))
    statistics[:, 0] += 2.5
    sure, unsure = DriftMonitor(calibration(count=200)), DriftMonitor(calibration(count=5))
    assert follow(sure, scores, statistics)[0] is not None
    assert follow(unsure, scores, statistics)[0] is None
    widths = [next(shift for shift in each.shifts() if shift.statistic == NAMES[0]) for each in (sure, unsure)]
    assert widths[0].high - widths[0].low < widths[1].high - widths[1].low


def test_intervals_are_those_of_the_textbook():
    from scipy import stats

    monitor = DriftMonitor(calibration(), risk=0.025)
    scores = np.where(np.arange(40) < 6, 50.0, 0.0)
    for score in scores:
        monitor.update(score)
    share, p_values = monitor.shifts()  # images without statistics say nothing of the teacher
    exact = stats.binomtest(6, 40).proportion_ci(0.95, "exact")
    assert (share.value, share.low, share.high) == pytest.approx((0.15, exact.low, exact.high))
    expected = stats.ks_2samp(scores[6:], monitor.normal)
    assert p_values.value == pytest.approx(expected.statistic)
    width = p_values.value - p_values.low
    assert stats.kstwobign.sf(width * np.sqrt(34 * len(monitor.normal) / (34 + len(monitor.normal)))) == pytest.approx(
        0.025, rel=1e-3
    )


def test_after_a_reset_drift_is_said_again():
    monitor = DriftMonitor(calibration())
    for _ in range(2):
        assert follow(monitor, [50.0] * 100, [None] * 100)[1] == 1
        monitor.reset()
        assert monitor.shifts() == []
    assert monitor.images == 200


@pytest.mark.parametrize(
    "options", [{"window": 5}, {"defect_rate": 1.0}, {"risk": 0.0}, {"tolerance": -1.0}, {"tolerance": float("nan")}]
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(BKDError, match="drift: "):
        DriftMonitor(calibration(), **options)


def test_level_statistics_are_what_they_are_called():
    level = torch.zeros(2, 3, 4, 8)
    level[0, :, 3, 0] = 2.0  # the last row, the first column
    level[1] = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))
    first, second = level_statistics([level])
    assert first.tolist() == pytest.approx([2 / 32, level[0].std(unbiased=False).item(), 2 / 32, 3.5 / 4, 0.5 / 8])
    assert second[2] == pytest.approx(level[1].mean((1, 2)).square().mean().sqrt().item())
    assert [*statistics_of(torch.stack([first, second]))] == [f"level 1 {name}" for name in LEVEL_STATISTICS]


def test_a_run_holds_the_statistics_of_its_normal_images(any_run, tiny_data):
    held = load_trained(any_run).calibration
    assert len(held.teacher) == 15
    detector = Detector.load(any_run)
    rows = []
    files = sorted((tiny_data / "train" / "good").iterdir())
    predictions = list(Observed(detector, detector, lambda *row: rows.append(row)).stream(files))
    assert [score for score, _ in rows] == [outcome.result.score for outcome in predictions]
    measured = statistics_of(torch.from_numpy(np.stack([row for _, row in rows])))
    if len(held.scores) == len(files):  # otherwise those of the validation images alone
        for name, (mean, std) in held.teacher.items():
            assert mean == pytest.approx(measured[name][0], abs=2e-3), name
            assert std == pytest.approx(measured[name][1], abs=2e-3), name


def test_watching_changes_no_prediction(any_run, tiny_data):
    detector = Detector.load(any_run)
    files = sorted((tiny_data / "test").rglob("*.png"))
    for options in ({}, {"tile": (40, 40), "overlap": 8}):
        plain = [outcome.result for outcome in detector.stream(files, **options)]
        watched = [
            outcome.result for outcome in detector.stream(files, monitor=DriftMonitor(detector.calibration), **options)
        ]
        assert [each.score for each in plain] == [each.score for each in watched]
        assert all(np.array_equal(a.anomaly_map, b.anomaly_map) for a, b in zip(plain, watched, strict=True))


def test_a_network_that_is_one_program_is_sampled(tiny_default_run, tiny_data, monkeypatch):
    detector = Detector.load(tiny_default_run)
    files = sorted((tiny_data / "test").rglob("*.png")) * 3
    eager, sampled = [], []
    list(Observed(detector, detector, lambda *row: eager.append(row)).stream(files))
    monkeypatch.setattr(Detector, "is_eager", False)
    list(Observed(detector, detector, lambda *row: sampled.append(row)).stream(files, batch=5))
    assert [index for index, (_, row) in enumerate(sampled) if row is not None] == [0, 8, 16]
    for index in (0, 8, 16):
        np.testing.assert_allclose(sampled[index][1], eager[index][1], rtol=1e-4, atol=1e-5)


def darker(tiny_data, folder):
    folder.mkdir()
    files = sorted((tiny_data / "train" / "good").iterdir())
    for index in range(30):
        image = load_image(files[index % len(files)])
        Image.fromarray((image * 0.5).astype(np.uint8)).save(folder / f"{index:02}.png")
    return folder


def test_darker_images_are_said_to_have_drifted(tiny_default_run, tiny_data, tmp_path, caplog):
    detector = Detector.load(tiny_default_run)
    monitor = DriftMonitor(detector.calibration)
    files = sorted(darker(tiny_data, tmp_path / "dark").iterdir())
    with caplog.at_level(logging.WARNING, "bkd_fast"):
        list(detector.stream(files, monitor=monitor))
    assert monitor.drift is not None
    assert [record.getMessage() for record in caplog.records] == [monitor.drift.sentence()]
    caplog.clear()
    main(["predict", str(tiny_default_run), str(tmp_path / "dark"), "--out", str(tmp_path / "out"), "--drift"])
    assert sum("drift since about image" in record.getMessage() for record in caplog.records) == 1


def test_calibrate_sets_the_statistics_and_a_run_without_is_watched_by_scores(
    tiny_default_run, tiny_data, tmp_path, caplog
):
    run = shutil.copytree(tiny_default_run, tmp_path / "run")
    manifest = json.loads((run / MANIFEST).read_text())
    del manifest["calibration"]["teacher"]  # as an earlier version wrote it
    write_manifest(run, {key: value for key, value in manifest.items() if key not in ("format", "sha256")})
    detector = Detector.load(run)
    monitor = DriftMonitor(detector.calibration)
    watch(detector, detector, monitor)
    assert "no statistics of its teacher to watch" in caplog.text
    assert {shift.statistic for shift in monitor.shifts()} <= {SHARE, P_VALUES}
    dark = darker(tiny_data, tmp_path / "dark")
    calibrate(run, dark)
    detector = Detector.load(run)
    assert len(detector.calibration.teacher) == 15
    monitor = DriftMonitor(detector.calibration)
    list(detector.stream(sorted(dark.iterdir()), monitor=monitor))
    assert monitor.drift is None  # what was dark is the normal now


ROOT = Path(__file__).resolve().parents[2]


def test_the_benchmark_sees_what_it_changes(tiny_default_run, tiny_data):
    command = [sys.executable, ROOT / "benchmarks" / "drift.py", tiny_default_run, tiny_data]
    options = ["--images", "2", "--seeds", "1", "--unchanged", "50"]
    done = subprocess.run([*map(str, command), *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| brightness")]
    assert len(rows) == 2
    assert "| 1 of 1 |" in rows[1]
