"""Each unusable input is one sentence that a user can act on, before anything is written."""

import json
import os
import re

import numpy as np
import pytest
import torch
from PIL import Image

from bkd_fast.artifact import load_trained, read_category, write_manifest
from bkd_fast.cli import main
from bkd_fast.errors import BKDError
from bkd_fast.inference.detector import Detector
from bkd_fast.training.train import train


def test_a_single_training_image(make_category, tiny_config, tmp_path):
    make_category(tmp_path / "data", train=1)
    with pytest.raises(BKDError, match=r"1 (normal|image|training)"):
        train(tmp_path / "data", tmp_path / "run", tiny_config)
    assert not (tmp_path / "run").exists()


def test_fewer_normals_than_shots(make_category, tiny_config, tmp_path):
    make_category(tmp_path / "data", train=4)
    with pytest.raises(BKDError, match=r"(?s)8.*(shots|support)"):
        train(tmp_path / "data", tmp_path / "run", tiny_config.with_changes({"support.shots": 8, "support": "sampled"}))
    assert not (tmp_path / "run").exists()


def test_a_broken_training_image_is_named_and_skipped_when_asked(make_category, tiny_config, tmp_path):
    data = make_category(tmp_path / "data", train=8)
    whole = (data / "train/good/001.png").read_bytes()
    (data / "train/good/001.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BKDError, match=r"001\.png"):
        train(data, tmp_path / "run", tiny_config)
    assert not (tmp_path / "run").exists()
    run = train(data, tmp_path / "run", tiny_config.with_changes({"training.epochs": 1}), skip_unreadable=True)
    assert "001.png" not in read_category(run).source.used


def test_an_occupied_output_folder(tiny_data, tiny_config, tmp_path):
    (tmp_path / "thesis.txt").write_text("do not overwrite")
    with pytest.raises(BKDError, match="not empty"):
        train(tiny_data, tmp_path, tiny_config)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_folder_without_permission(tiny_data, tiny_config, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(BKDError, match="cannot be written"):
        train(tiny_data, tmp_path / "run", tiny_config)


def test_an_output_folder_that_is_a_file(tiny_data, tiny_config, tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(BKDError, match="cannot be written"):
        train(tiny_data, tmp_path / "run", tiny_config)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "nowhere", "--out", "run"], "nowhere"),
        (["train", "{data}", "--out", "run", "--teacher", "resnet_18"], "did you mean|close names|no model"),
        (["train", "{data}", "--out", "run", "--preset", "best"], "default, paper, rd4ad"),
        (["train", "{data}", "--out", "run", "--set", "fussion=sum"], "did you mean 'anomaly_map.fusion'"),
        (["train", "{data}", "--out", "run", "--image-size", "24"], "from 32"),
        (["train", "{data}", "--out", "run", "--category", "tyle"], "tile"),
        (["evaluate", "nowhere"], "no run folder"),
        (["train", "{data}", "--out", "run", "--false-alarms", "nan"], "false_alarms is nan: expected a finite"),
        (["train", "{data}", "--out", "run", "--set", "training.learning_rate=Infinity"], "learning_rate is inf"),
        (["train", "{data}", "--out", "run", "--devices", "0"], "devices is 0: expected a value from 1"),
        (["train", "{data}", "--out", "run", "--cache-gb", "nan"], "cache_gb is nan"),
        (["train", "{data}", "--out", "run", "--cache-gb", "-1"], "cache_gb is -1.0: expected a value from 0"),
        (["train", "{data}", "--out", "run", "--weights", "none", "--max-pixels", "100"], "more pixels than is safe"),
        (["train", "{data}", "--out", "run", "--max-pixels", "0"], "data.max_pixels is 0"),
        (["evaluate", "{run}", "--device", "nonsense"], "device is 'nonsense': expected 'auto', 'cpu'"),
        (["calibrate", "{run}", "--device", "meta"], "no META device"),
        (["calibrate", "{run}", "--false-alarms", "nan"], "false-alarm rate is nan: expected a finite"),
        (["calibrate", "{run}", "--false-alarms", "1"], "false-alarm rate is 1.0: expected a number between 0 and 1"),
        (["predict", "{run}", "{data}", "--out", "out", "--device", "nonsense"], "device is 'nonsense'"),
        (["predict", "{run}", "{data}", "--out", "out", "--threshold", "nan"], "threshold is nan: expected a finite"),
        (["predict", "{run}", "{data}", "--out", "out", "--threshold=-inf"], "threshold is -inf: expected a finite"),
        (["predict", "{run}", "{data}", "--out", "out", "--tile", "0"], "tile is 0: expected the height and width"),
        (["predict", "{run}", "{data}", "--out", "out", "--tile", "9", "9", "9"], "expected the height and width"),
        (["predict", "{run}", "{data}", "--out", "out", "--overlap", "5"], "overlap is 5 and tile is None"),
        (["predict", "{run}", "{data}", "--out", "out", "--tile", "9", "--overlap", "9"], "overlap is 9"),
        (["predict", "{run}", "{data}", "--out", "out", "--max-pixels", "-1"], "max_pixels is -1"),
        (["predict", "{run}", "{data}", "--out", "out", "--precision", "16"], "precision is '16'"),
        (["ablate", "{data}", "--out", "out", "--table", "4", "--seeds", "0"], "seeds"),
        (["bench", "--seconds", "nan"], "seconds is nan: expected a finite number above 0"),
        (["bench", "--only", "convolution"], "no benchmark 'convolution': choose some of modulated_deform_conv2d"),
        (["bench", "--threads", "0"], "threads is 0: expected 1 or more"),
        (["predict", "{run}", "nowhere.png", "--out", "out"], "nowhere.png"),
        (["predict", "{run}", "{data}", "--out", "{data}"], "not empty"),
    ],
)
def test_the_command_line_says_it_in_one_line(arguments, words, tiny_data, tiny_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([text.format(data=tiny_data, run=tiny_run) for text in arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("bkd-fast: ")
    assert re.search(words, error), error
    assert not list(tmp_path.iterdir())


def change_config(run, change):
    manifest = json.loads((run / "manifest.json").read_text())
    change(manifest)
    manifest.pop("sha256")
    write_manifest(run, manifest)


def _linked(path):
    path.symlink_to(path.rename(path.with_suffix(".moved")))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda run: (run / "manifest.json").unlink(), "has no manifest.json"),
        (lambda run: (run / "manifest.json").write_text("{"), "not valid JSON"),
        (lambda run: change_config(run, lambda m: m.update(format=99)), "format 99.*reads format 6"),
        (
            lambda run: change_config(run, lambda m: m.pop("calibration")),
            "the manifest has bkd_fast, files, shown, source, tiles, unified: expected bkd_fast, calibration, files",
        ),
        (lambda run: (run / "config.toml").write_text("[memory]"), "config.toml was altered"),
        (lambda run: (run / "manifest.json").write_text('{"format": 4}'), "run format 4.*reads format 6: train again"),
        (lambda run: (run / "support/999.png").write_bytes(b""), "does not belong to the run"),
        (lambda run: _linked(run / "model.safetensors"), "no symbolic links"),
        (lambda run: (run / "manifest.json").rename(run / "config.json"), "written by an earlier bkd_fast"),
        (lambda run: (run / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda run: next((run / "support").iterdir()).unlink(), "support/.* is missing"),
        (lambda run: (run / "model.safetensors").write_bytes(b"0" * 64), "was altered"),
    ],
)
def test_a_damaged_run_folder(damage, words, run):
    damage(run)
    with pytest.raises(BKDError, match=words):
        load_trained(run)


def test_an_unfinished_run_says_how_to_go_on(tmp_path):
    (tmp_path / "checkpoint.safetensors").write_bytes(b"")
    with pytest.raises(BKDError, match="--resume"):
        load_trained(tmp_path)


@pytest.mark.parametrize(
    "wrong", [True, "5", float("nan"), float("inf"), -1, 10**400, [5], np.zeros(2), 2.5 + 0j], ids=lambda x: repr(x)[:9]
)
def test_numbers_are_checked_wherever_they_come_in(tiny_run, wrong):
    detector = Detector.load(tiny_run, device="cpu")
    image = np.zeros((64, 64, 3), np.uint8)
    calls = {
        "batch": lambda: detector.stream([image], batch=wrong),
        "workers": lambda: detector.stream([image], workers=wrong),
        "tile": lambda: detector(image, tile=wrong),
        "overlap": lambda: detector(image, tile=32, overlap=wrong),
        "max_pixels": lambda: Detector.load(tiny_run, max_pixels=wrong),
    }
    if repr(wrong) != "-1":
        calls["threshold"] = lambda: setattr(detector, "threshold", wrong)
        calls["pixel_threshold"] = lambda: setattr(detector, "pixel_threshold", wrong)
    for name, call in calls.items():
        with pytest.raises(BKDError, match=rf"{name} is |an image of 64 x 64 pixels is smaller than a tile of"):
            call()


def test_numbers_of_numpy_are_numbers(tiny_run):
    detector = Detector.load(tiny_run, device="cpu", max_pixels=np.int64(10_000))
    image = np.zeros((64, 64, 3), np.uint8)
    assert len(list(detector.stream([image], batch=np.int32(1), workers=np.uint8(1)))) == 1
    detector(image, tile=np.array([32, 64]), overlap=np.int64(4))
    detector.threshold = np.float32(0.5)
    assert type(detector.threshold) is float


@pytest.mark.parametrize("device", ["nonsense", None, 3.5, "meta", "cuda:99"])
def test_devices_that_are_not_there(tiny_run, device):
    with pytest.raises(BKDError, match=rf"device is {device!r}|no META device|CUDA device|there are"):
        Detector.load(tiny_run, device=device)


def test_what_is_not_an_image(tiny_run):
    """tests/data/test_image.py has more."""
    for image, words in ((np.zeros((8, 8, 5), np.uint8), "8, 8, 5"), (7, "int"), (torch.zeros(4, 9, 9), "4, 9, 9")):
        with pytest.raises(BKDError, match=words):
            Detector.load(tiny_run)(image)


@pytest.mark.parametrize("images", ["a.png", np.zeros((8, 8, 3), np.uint8), b"", 7, None])
def test_a_stream_of_one_image_is_refused(tiny_run, images):
    with pytest.raises(BKDError, match="expected an iterable of images"):
        Detector.load(tiny_run).stream(images)


def test_an_unreadable_image_in_a_batch_keeps_what_was_predicted(tiny_run, tmp_path):
    for name in ("a", "b"):
        Image.fromarray(np.full((64, 64, 3), 90, np.uint8)).save(tmp_path / f"{name}.png")
    (tmp_path / "c.png").write_bytes(b"not an image")
    (tmp_path / "d.png").write_bytes((tmp_path / "a.png").read_bytes())
    arguments = [str(tiny_run), *(str(tmp_path / f"{name}.png") for name in "abcd"), "--out"]
    assert main(["predict", *arguments, str(tmp_path / "stopped")]) == 1
    assert len((tmp_path / "stopped/scores.csv").read_text().splitlines()) == 1 + 2
    assert main(["predict", *arguments, str(tmp_path / "whole"), "--skip-unreadable"]) == 0
    assert len((tmp_path / "whole/scores.csv").read_text().splitlines()) == 1 + 3
