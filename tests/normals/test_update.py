"""Good images that come later: what a run learns from them, and that it is whole whenever a process ends."""

import os
import pickle
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import rows_of

from bkd_fast import artifact
from bkd_fast.artifact import load_trained, read_category, save_trained, write_manifest
from bkd_fast.cli import main
from bkd_fast.data import load_support
from bkd_fast.errors import BKDError
from bkd_fast.evaluation.evaluate import evaluate
from bkd_fast.evaluation.update import update
from bkd_fast.export.comparison import at_hand
from bkd_fast.inference.detector import Detector
from bkd_fast.inference.drift import DriftMonitor
from bkd_fast.normals.thresholds import measure_normals
from bkd_fast.normals.update import Joined, Kept, _measured_without
from bkd_fast.training.train import train


def new_kind(seed, size=(72, 80)):
    """A good image of a new kind: the gradient of the tiny data the other way round, and green."""
    ramp = np.linspace(140, 60, size[1])[None, :, None] * np.ones((*size, 1)) * (0.7, 1.2, 0.7)
    return np.clip(ramp + np.random.default_rng(seed).normal(0, 12, (*size, 3)), 0, 255).astype(np.uint8)


@pytest.fixture
def folder(tmp_path):
    """A folder of ten of them."""
    (tmp_path / "new").mkdir()
    for seed in range(10):
        Image.fromarray(new_kind(seed)).save(tmp_path / f"new/{seed:03}.png")
    return tmp_path / "new"


@pytest.fixture
def away(run):
    """The same run, its training images gone."""
    manifest = read_category(run)
    source = replace(manifest.source, root=str(run / "nowhere"))
    write_manifest(run, replace(manifest, source=source))
    return run


def predictions(run, data):
    detector = Detector.load(run, device="cpu")
    others = detector([new_kind(seed) for seed in range(100, 106)])
    return others, detector(sorted((data / "test/hole").iterdir()))


def test_a_new_kind_of_good_image_is_learned_and_defects_stay_defects(run, folder, tiny_data, capsys):
    before, defects_before = predictions(run, tiny_data)
    old = read_category(run)
    assert all(prediction.label for prediction in [*before, *defects_before])
    assert main(["update", str(run), str(folder)]) == 0
    after, defects = predictions(run, tiny_data)
    assert all(new.score < prediction.score - 1 for new, prediction in zip(after, before, strict=True))
    assert not any(prediction.label for prediction in after)
    assert all(prediction.label for prediction in defects)
    new = read_category(run)
    assert new.calibration.source == "leave-one-out"
    assert len(new.calibration.scores) == 10 + 10
    assert new.calibration.teacher.keys() == old.calibration.teacher.keys()
    assert new.calibration.teacher != old.calibration.teacher
    text = capsys.readouterr().out
    assert "new images: 8 to learn from, 2 for validation; new among 16 supports: 8" in text
    assert "above the threshold before: 10 of 10 new images" in text
    assert f"{old.calibration.threshold:.4g} -> {new.calibration.threshold:.4g}, from 20 images: those of train" in text
    trained = load_trained(run)
    origin = trained.model.memories[0].get_buffer("origin")
    assert {int(item) // 8 for item in origin} == {0, 1}  # both kinds have items
    assert trained.support[0].shape[:2] == (1, 16)


def test_drift_and_the_log_follow(run, folder):
    before = read_category(run).calibration
    update(run, folder)
    manifest = read_category(run)
    detector = Detector.load(run, device="cpu")
    moved = []
    for calibration in (before, manifest.calibration):
        monitor = DriftMonitor(calibration)
        list(detector.stream([new_kind(seed) for seed in range(20, 32)], monitor=monitor))
        moved.append(max(abs(shift.value) for shift in monitor.shifts() if shift.statistic.startswith("level")))
    assert moved[0] > 3.5 > 1.5 > moved[1]  # std
    (addition,) = manifest.source.additions
    assert addition.threshold == (before.threshold, manifest.calibration.threshold)
    assert addition.pixel_threshold == (before.pixel_threshold, manifest.calibration.pixel_threshold)
    assert (len(addition.train_files), len(addition.validation_files)) == (8, 2)
    (row,) = rows_of(run, "updates.csv")
    assert (row["folder"], row["learned"], row["validation"]) == (str(folder), "8", "2")
    assert float(row["threshold_after"]) == manifest.calibration.threshold


def test_the_same_images_are_left_out_and_no_new_one_is_an_error(run, folder, tiny_data, caplog):
    update(run, folder)
    whole = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for known in (folder, tiny_data / "train/good"):
        with pytest.raises(BKDError, match="none of 10 images is new to the run"):
            update(run, known)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == whole
    Image.fromarray(new_kind(50)).save(folder / "more.png")
    caplog.clear()
    text = update(run, folder)
    assert "10 of 11 images are in the run already and are left out: 000.png" in caplog.text
    assert "new images: 1 to learn from, 0 for validation; new among 17 supports: 1" in text
    assert len(read_category(run).calibration.scores) == 21
    assert {path.name for path in run.iterdir()} == {
        "manifest.json", "config.toml", "model.2.safetensors", "support.2", "support.2.safetensors", "updates.csv",
    }  # fmt: skip
    metrics = evaluate(run, pictures=False, progress=False)
    assert metrics["categories"]["tile"]["images"] == {"train": 8 + 8 + 1, "validation": 2 + 2, "test": 6}


def test_images_that_were_set_aside_for_testing_are_left_out(make_category, tiny_default, tmp_path, caplog):
    data = make_category(tmp_path / "made", train=20)
    good = data / "train/good"
    run = train(good, tmp_path / "run", tiny_default, anomalous=data / "test/hole", progress=False)
    with pytest.raises(BKDError, match="is new to the run"):
        update(run, good)
    assert "4 of 20 images were set aside for testing in training and are left out" in caplog.text
    update(run, data / "test/good")
    assert evaluate(run, pictures=False, progress=False)["categories"]["good"]["images"]["test"] == 4 + 3


def test_without_the_former_images_thresholds_come_from_supports_and_new_ones(away, folder, tiny_data):
    before = load_trained(away).model.get_extra_state()
    text = update(away, folder)
    assert "10 of 10 former images are missing or have changed" in text
    assert "from 18 images: 8 supports in the run and the new ones" in text
    assert torch.equal(load_trained(away).model.get_extra_state(), before)  # the scales
    others, defects = predictions(away, tiny_data)
    assert not any(prediction.label for prediction in others)
    assert all(prediction.label for prediction in defects)
    # A second time, when the first new images are at hand and those of training are not.
    Image.fromarray(new_kind(60)).save(folder / "more.png")
    assert "10 of 20 former images are missing" in update(away, folder)


def test_a_changed_former_image_is_not_at_hand(tiny_default, make_category, folder, tmp_path):
    data = make_category(tmp_path / "data/tile", train=6)
    run = train(data, tmp_path / "run", tiny_default, progress=False)
    Image.fromarray(new_kind(0)).save(data / "train/good/003.png")
    assert "1 of 6 former images are missing or have changed, such as" in update(run, folder)


def test_supports_stand_for_the_former_images_that_they_are(tiny_default_run, tiny_data):
    """All images of training are supports here, so both ways measure the same."""
    trained, manifest = load_trained(tiny_default_run), read_category(tiny_default_run)
    kept = Kept(trained.support, torch.device("cpu"))
    fresh = Kept([level[:, :0] for level in trained.support], torch.device("cpu"))
    support = trained.model.make_support(trained.support)
    validation = Kept([level[:, 2:4] for level in trained.support], torch.device("cpu"))
    expected = measure_normals(trained.model, support, kept, validation, manifest.shown, rescale=False)
    found = _measured_without(trained.model, support, kept, fresh, validation, manifest, manifest)
    assert found == expected
    assert len(found.images) == 10
    twice = Joined(kept, validation)
    assert twice.image_of == list(range(10))
    for whole, level in zip(twice.levels([1, 7, 9]), trained.support, strict=True):
        assert torch.equal(whole, level[0, [1, 7, 3]].float())


def test_a_defect_among_the_new_images_is_named(run, tiny_data, folder, caplog):
    shutil.copy(tiny_data / "test/hole/001.png", folder / "oops.png")
    text = update(run, folder, dry_run=True)
    alike, extreme = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert "11 of 11 new images score higher than each of the 10 normal images so far (p-value 0.091)" in alike
    assert "1 of 11 new images are unlike all other good images" in extreme
    assert "oops.png" in extreme
    assert text.startswith("nothing is written")
    assert not read_category(run).source.additions


@pytest.mark.parametrize("name", ["tiny_run", "tiny_student_run"])
def test_what_was_trained_keeps_its_weights(name, request, folder, tmp_path):
    run = shutil.copytree(request.getfixturevalue(name), tmp_path / "trained")
    before = load_trained(run).model.state_dict()
    text = update(run, folder)
    for key, value in load_trained(run).model.state_dict().items():
        taken = name == "tiny_run" and key in ("memories.0.items", "memories.0.origin", "support_excess")
        assert torch.equal(value, before[key]) is not (taken or key == "_extra_state"), key
    scored = "20 images: those of training" if name == "tiny_run" else "4 images: validation images, former and new"
    assert scored in text


def test_a_sampled_support_is_drawn_again_from_all_images(tiny_data, tiny_student, folder, tmp_path, away):
    config = tiny_student.with_changes({"support": "sampled", "training.epochs": 1, "alignment": None})
    run = train(tiny_data, tmp_path / "sampled", config, progress=False)
    update(run, folder)
    shown = read_category(run).shown
    assert len(shown) == 2
    assert load_trained(run).support[0].shape[:2] == (1, 2)
    manifest = read_category(run)
    source = replace(manifest.source, root=str(run / "nowhere"))
    write_manifest(run, replace(manifest, source=source))
    (tmp_path / "one").mkdir()
    Image.fromarray(new_kind(70)).save(tmp_path / "one/a.png")
    with pytest.raises(BKDError, match="expected at least two, as the former ones are gone"):
        update(run, tmp_path / "one")
    Image.fromarray(new_kind(71)).save(tmp_path / "one/b.png")
    assert "from 1 images: new validation images" in update(run, tmp_path / "one")


@pytest.mark.parametrize("at_hand", [True, False])
def test_a_run_in_tiles_takes_tiles(at_hand, tiny_default, make_category, folder, tmp_path):
    config = tiny_default.with_changes({"teacher.tile": 48, "support.shots": 2})
    data = make_category(tmp_path / "data/tile")
    run = train(data, tmp_path / "tiled", config, progress=False)
    tiles = read_category(run).tiles
    assert tiles == [4] * 8
    if not at_hand:
        shutil.rmtree(data)
    text = update(run, folder)
    manifest = read_category(run)
    assert manifest.tiles == [4] * 16
    assert len(manifest.shown) == 64
    assert len(manifest.calibration.scores) == (20 if at_hand else 10)
    assert ("those of training and the new ones" if at_hand else "10 images: the new ones") in text
    assert not any(p.label for p in Detector.load(run, device="cpu")([new_kind(seed) for seed in (100, 101)]))


def test_an_image_that_cannot_be_used_leaves_the_run_unchanged(run, folder, tiny_data, tmp_path):
    whole = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    (folder / "a.png").write_bytes(b"not an image")
    for given, message in (
        (folder, r"a\.png"),
        (tmp_path / "nowhere", "there is no folder"),
        (tiny_data, "in MVTec AD's layout: expected a folder of good images"),
        (run, "is a folder that bkd_fast wrote"),
    ):
        with pytest.raises(BKDError, match=message):
            update(run, given)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == whole
    assert "new images: 8 to" in update(run, folder, skip_unreadable=True)


def test_what_is_out_of_date_is_said(run, folder):
    for name in ("model.onnx", "model.onnx.json", "metrics.json", "report.html"):
        (run / name).write_text("{}")
    text = update(run, folder)
    assert "model.onnx in the run: of the run before, export again" in text
    assert "metrics.json, report.html in the run: of the run before, evaluate again" in text


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_that_is_killed_leaves_the_old_run_or_the_new_one(tiny_default_run, tmp_path):
    """Killed before each step on files, as the operating system sees them."""
    trained, manifest = load_trained(tiny_default_run), read_category(tiny_default_run)
    old = manifest.calibration
    changed = replace(manifest, calibration=replace(old, threshold=old.threshold + 1), shown=[3, 5])
    pictures = [np.zeros((72, 80, 3), np.uint8)] * 2
    levels = [level[:, [3, 5]].clone() for level in trained.support]
    steps, seen, kills = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"}, set(), 0
    while True:
        run = shutil.copytree(tiny_default_run, tmp_path / "run")
        child = os.fork()
        if not child:
            left = [kills]

            def watch(event, arguments, left=left, run=run):
                ours = event in steps and arguments and str(run) in str(arguments[0])
                if ours and (event != "open" or arguments[1] not in (None, "r", "rb")):
                    left[0] -= 1
                    if left[0] < 0:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(watch)
            save_trained(run, trained.model, changed, pictures, levels)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        calibration = load_trained(run).calibration
        assert calibration in (old, changed.calibration)
        seen.add(calibration.threshold)
        # The next one finds no trouble, and clears up.
        save_trained(run, trained.model, changed, pictures, levels)
        assert load_trained(run).calibration == changed.calibration
        assert len([path for path in run.iterdir() if path.name.startswith(("model", "support"))]) == 3
        shutil.rmtree(run)
        if os.WIFEXITED(status):
            break
        kills += 1
    assert os.WEXITSTATUS(status) == 0
    assert kills > 10
    assert seen == {old.threshold, changed.calibration.threshold}


def test_a_reader_is_not_stopped_by_an_update(tiny_default_run, folder, tmp_path, monkeypatch):
    """It has read the manifest, and then the files are gone."""
    run = shutil.copytree(tiny_default_run, tmp_path / "run")
    before = read_category(run)
    update(run, folder)
    original, answers = artifact.read_category, [before]
    monkeypatch.setattr(artifact, "read_category", lambda path: answers.pop() if answers else original(path))
    assert len(load_trained(run).calibration.scores) == 20
    assert not answers


def test_a_detector_takes_images_in_and_is_saved(tiny_default_run, folder, tmp_path, caplog):
    detector = Detector.load(tiny_default_run, device="cpu")
    unseen = [new_kind(seed) for seed in range(100, 104)]
    before = detector(unseen)
    images = [*sorted(folder.iterdir())[:3], *(new_kind(seed) for seed in range(3, 8)), Image.fromarray(new_kind(8))]
    caplog.set_level("INFO", "bkd_fast")
    grown = detector.add_normals(images)
    assert "new images: 7 to learn from, 2 for validation" in caplog.text
    assert [p.score for p in detector(unseen)] == [p.score for p in before]
    after = grown(unseen)
    assert all(new.score < old.score for new, old in zip(after, before, strict=True))
    assert not any(prediction.label for prediction in after)
    again = grown.add_normals(torch.from_numpy(new_kind(9)).permute(2, 0, 1))
    assert len(again.calibration.scores) == 8 + 7 + 1  # the arrays are gone: their supports stand for them
    copied = pickle.loads(pickle.dumps(grown))
    assert [p.score for p in copied(unseen)] == [p.score for p in after]
    grown.threshold = 12.5
    grown.save(tmp_path / "saved")
    folder_of_grown = grown._run
    del grown, copied
    assert not folder_of_grown.exists()
    loaded = Detector.load(tmp_path / "saved", device="cpu")
    assert loaded.threshold == 12.5
    assert [p.score for p in loaded(unseen)] == [p.score for p in after]
    again.save(tmp_path / "saved")  # a run of the same training
    assert len(read_category(tmp_path / "saved").source.additions) == 2
    with pytest.raises(BKDError, match="updated since this detector was loaded"):
        pickle.dumps(loaded)


def test_what_a_detector_cannot_save_or_take_in(tiny_default_run, tiny_run, folder, tmp_path):
    detector = Detector.load(tiny_default_run, device="cpu")
    with pytest.raises(BKDError, match="none of 1 images is new"):
        detector.add_normals([load_first(tiny_default_run)])
    with pytest.raises(BKDError, match="does not exist"):
        detector.add_normals([tmp_path / "nothing.png"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("mine")
    other = shutil.copytree(tiny_run, tmp_path / "other")
    for place in (tmp_path / "full", other):
        with pytest.raises(BKDError, match="holds something else than a run of the same training"):
            detector.save(place)
    detector.pixel_threshold = 0
    with pytest.raises(BKDError, match="pixel_threshold is 0"):
        detector.save(tmp_path / "saved")
    detector.set_support(sorted(folder.iterdir()))
    for use in (lambda: detector.save(tmp_path / "saved"), lambda: detector.add_normals([new_kind(0)])):
        with pytest.raises(BKDError, match="set_support has replaced the supports"):
            use()
    assert not (tmp_path / "saved").exists()


def load_first(run):
    """Return the path of an image that a run was trained on."""
    source = read_category(run).source
    return Path(source.root, "train/good", next(iter(source.train_files)))


def test_an_export_of_an_updated_run_is_checked_on_the_supports_of_now(away, folder):
    update(away, folder)
    trained = load_trained(away)
    images = at_hand(Detector(trained, "cpu", pack=False), trained.source, away, 4)
    expected = load_support(away / read_category(away).file("support"), trained.config.teacher.size, 4).flip(-1)
    assert all(map(torch.equal, images, expected))
    assert len(images) == 5
