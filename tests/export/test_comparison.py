"""``bkd-fast check``: an exported model beside its run, and what it must notice."""

import json
import shutil

import numpy as np
import pytest
import torch

from bkd_fast.artifact import load_trained
from bkd_fast.cli import main
from bkd_fast.errors import BKDError
from bkd_fast.evaluation.calibrate import calibrate
from bkd_fast.export import check, export
from bkd_fast.export.comparison import at_hand, compare, inputs, validation_files
from bkd_fast.export.formats import Runner, format_of
from bkd_fast.inference.detector import Detector


@pytest.fixture(scope="module")
def run(tiny_default_run, tmp_path_factory):
    """A run of this module's own, with a model in it."""
    folder = tmp_path_factory.mktemp("run") / "tile"
    shutil.copytree(tiny_default_run, folder)
    export(folder, "onnx")
    return folder


@pytest.fixture(scope="module")
def detector(tiny_default_run):
    return Detector.load(tiny_default_run, device="cpu")


def altered(detector, change):
    """What a detector computes, changed, as an exported model gives it."""

    def predict(images):
        scores, maps = (value.numpy().copy() for value in detector.score(torch.from_numpy(images)))
        return change(scores, maps)

    return Runner(predict, {})


def test_the_command_says_that_a_model_computes_what_its_run_does(run, tiny_data, capsys):
    assert main(["check", str(run / "model.onnx"), str(run), str(tiny_data / "test"), "--limit", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:24].strip() for line in lines[:-1]] == [
        "map error, max", "map error, mean", "score error, max", "score error, mean",
        "images decided otherwise", "pixels decided otherwise", "ms an image, p50 and p95",
    ]  # fmt: skip
    assert lines[-1] == "ok: the model computes what the run does"


def test_the_command_fails_on_a_model_that_computes_something_else(run, tiny_data, tmp_path, capsys):
    onnx = pytest.importorskip("onnx")
    model = onnx.load(run / "model.onnx")
    first = next(one for one in model.graph.initializer if one.name.startswith("model.teacher.network.conv1"))
    first.CopyFrom(onnx.numpy_helper.from_array(1.05 * onnx.numpy_helper.to_array(first), first.name))
    onnx.save(model, tmp_path / "model.onnx")
    assert main(["check", str(tmp_path / "model.onnx"), str(run), str(tiny_data / "test" / "good")]) == 1
    out = capsys.readouterr().out
    assert "FAILED: do not use this model" in out.splitlines()
    assert out.count("FAILED") > 2


def test_errors_are_in_the_units_that_the_tolerances_have(detector, tiny_data):
    images = list(inputs(detector, sorted((tiny_data / "test").rglob("*.png"))[:4]))
    unit = detector.calibration.spread

    def change(scores, maps):
        maps[0, 3, 4] += 0.5 * max(detector.pixel_threshold, maps[0, 3, 4])
        return scores + 0.25 * unit, maps

    found = compare(detector, altered(detector, change), images)
    assert found.map_max == pytest.approx(0.5, rel=1e-3)
    assert found.map_mean == pytest.approx(0.5 / 64**2, rel=1e-3)
    assert found.score_max == pytest.approx(0.25, rel=1e-2)
    assert found.score_mean == pytest.approx(0.25, rel=1e-2)
    assert {failure.partition(" is ")[0] for failure in found.failures} >= {"map error, max", "score error, max"}
    assert found.images == 4
    assert all(0 < p50 <= p95 for p50, p95 in (found.run_ms, found.model_ms))
    assert not compare(detector, altered(detector, lambda scores, maps: (scores, maps)), images).failures


@pytest.mark.parametrize("wrong", ["nan", "shape", "error"])
def test_outputs_that_are_none_are_noticed(wrong, detector, tiny_data):
    images = list(inputs(detector, sorted((tiny_data / "test/good").iterdir())[:1]))
    if wrong == "nan":
        found = compare(detector, altered(detector, lambda scores, maps: (scores, maps * np.nan)), images)
        assert any(failure.startswith("map error, max is nan") for failure in found.failures)
        return

    def change(scores, maps):
        if wrong == "error":
            raise RuntimeError("out of everything")
        return scores, maps[:, 1:]

    with pytest.raises(BKDError, match="cannot compute images of .*out of everything" if wrong == "error" else "gives"):
        compare(detector, altered(detector, change), images)


def test_decisions_count_but_not_those_that_rounding_takes(detector, tiny_data):
    images = list(inputs(detector, sorted((tiny_data / "test/good").iterdir())[:1]))
    score = float(detector.score(images[0][None])[0])
    unit = max(detector.calibration.spread, 0.01 * abs(detector.threshold))
    before = detector.threshold
    try:
        for distance, wrong in ((0.01, 0), (0.03, 1)):
            detector.threshold = score + distance * unit
            flipped = altered(detector, lambda scores, maps: (scores + np.float32(0.04 * unit), maps))
            found = compare(detector, flipped, images)
            assert (found.decisions, found.wrong) == (1, wrong)
            assert any("decided otherwise" in failure for failure in found.failures) == bool(wrong)
    finally:
        detector.threshold = before


def test_a_model_of_an_earlier_calibration_or_another_run_is_refused(run, tiny_student_run, tiny_data, tmp_path):
    good = tiny_data / "test" / "good"
    later = tmp_path / "later"
    shutil.copytree(run, later)
    calibrate(later, false_alarms=0.4, good=good)
    with pytest.raises(BKDError, match=r"model.onnx has the threshold .*, and .* has .*: .* export it again"):
        check(run / "model.onnx", later, good)
    with pytest.raises(BKDError, match="export it again"):
        check(run / "model.onnx", tiny_student_run, good)


def test_files_that_are_no_models_are_refused(run, tiny_data, tmp_path):
    good = tiny_data / "test" / "good"
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn.onnx").write_bytes((run / "model.onnx").read_bytes()[:1000])
    (tmp_path / "other.pt2").write_text("nothing")
    for model, images, message in (
        ("missing.onnx", good, "there is no file"),
        ("torn.onnx", good, "cannot be read by its run-time"),
        ("other.pt2", good, "is not an exported model"),
        (run / "model.onnx", tmp_path / "empty", "there are no images in"),
    ):
        with pytest.raises(BKDError, match=message):
            check(tmp_path / model, run, images)


def test_a_file_without_settings_is_refused(run, tiny_data, tmp_path):
    onnx = pytest.importorskip("onnx")
    for version in (None, "7"):
        model = onnx.load(run / "model.onnx")
        kept = [one for one in model.metadata_props if one.key != "settings_version"]
        del model.metadata_props[:]
        model.metadata_props.extend(kept)
        if version:
            model.metadata_props.add(key="settings_version", value=version)
        onnx.save(model, tmp_path / "model.onnx")
        message = "settings of version 7" if version else "does not say how it is used"
        with pytest.raises(BKDError, match=message):
            check(tmp_path / "model.onnx", run, tiny_data / "test" / "good")


def test_an_export_is_checked_on_validation_images_or_else_on_mirrored_supports(tiny_default_run, tiny_data, tmp_path):
    trained = load_trained(tiny_default_run)
    detector = Detector(trained, "cpu", pack=False)
    files = validation_files(trained.source)
    assert sorted(path.name for path in files) == sorted(trained.source.validation_files)
    assert len(at_hand(detector, trained.source, trained.folder)) == len(files) + 1
    # An image that was changed since is none of them.
    moved = tmp_path / "tile"
    shutil.copytree(tiny_data, moved)
    changed = moved / "train/good" / files[0].name
    changed.write_bytes(changed.read_bytes() + b" ")
    source = type(trained.source)(**{**vars(trained.source), "root": str(moved)})
    assert [path.name for path in validation_files(source)] == [files[1].name]
    gone = type(trained.source)(**{**vars(trained.source), "root": str(tmp_path / "gone")})
    supports = at_hand(detector, gone, trained.folder)
    assert len(supports) == 1 + len(list((trained.folder / "support").iterdir()))
    np.testing.assert_array_equal(supports[0], detector.sample[0])


def test_the_settings_are_in_the_file_and_beside_it(run):
    onnx = pytest.importorskip("onnx")
    texts = {one.key: one.value for one in onnx.load(run / "model.onnx").metadata_props}
    beside = json.loads((run / "model.onnx.json").read_text())
    assert set(beside) - {"check"} == set(texts)
    assert (texts["color_order"], texts["input_layout"], texts["teacher"]) == ("RGB", "NCHW", "test_resnet")
    assert float(texts["threshold"]) == load_trained(run).calibration.threshold
    assert beside["check"]["precision"] == "float32"
    assert format_of(run / "model.onnx") == "onnx"
