import json

import pytest

from bkd_fast.artifact import load_trained
from bkd_fast.cli import main
from bkd_fast.errors import BKDError
from bkd_fast.evaluation.calibrate import calibrate
from bkd_fast.inference.detector import Detector


def test_another_rate_takes_another_of_the_scores_in_the_run(run):
    before = load_trained(run).calibration
    text = calibrate(run, false_alarms=0.3)
    after = load_trained(run).calibration
    assert after.false_alarms == 0.3
    assert after.threshold in before.scores
    assert after.pixel_threshold in before.maxima
    assert after.threshold < before.threshold
    assert (after.scores, after.source) == (before.scores, before.source)
    assert "false alarms" in text


def test_new_good_images_give_the_thresholds(run, tiny_data):
    good = tiny_data / "test/good"
    calibrate(run, good, false_alarms=0.5)
    detector = Detector.load(run)
    predictions = [detector(path) for path in sorted(good.iterdir())]
    assert detector.calibration.source == "calibration"
    assert detector.calibration.scores == pytest.approx(sorted(p.score for p in predictions), rel=1e-5)
    assert sum(p.label for p in predictions) == 1  # of three, the largest is above the second
    assert {round(p.p_value, 3) for p in predictions} == {0.5, 0.75, 1.0}


def test_known_defects_are_reported_and_move_nothing(run, tiny_data, capsys):
    before = load_trained(run).calibration
    status = main(["calibrate", str(run), "--defects", str(tiny_data / "test/hole")])
    printed = capsys.readouterr().out
    assert status == 0
    assert load_trained(run).calibration == before
    assert "of 3 defective images" in printed
    assert printed.count(" %   ") == 7


def test_what_cannot_be_used_leaves_the_run_as_it_was(run, tmp_path):
    before = (run / "manifest.json").read_bytes()
    (tmp_path / "empty").mkdir()
    with pytest.raises(BKDError, match="no images"):
        calibrate(run, tmp_path / "empty")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/a.png").write_bytes(b"not an image")
    with pytest.raises(BKDError, match=r"a\.png"):
        calibrate(run, tmp_path / "broken")
    with pytest.raises(BKDError, match="between 0 and 1"):
        calibrate(run, false_alarms=2.0)
    assert (run / "manifest.json").read_bytes() == before
    assert "calibration" in json.loads(before)
