"""Each unusable input is one sentence that a user can act on, before anything is written."""

import json
import os
import shutil

import numpy as np
import pytest
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
        train(
            tmp_path / "data",
            tmp_path / "run",
            tiny_config.with_changes(
                {"support.shots": 8, "support": "sampled", "support.per": "step", "support.aggregation": "mean"}
            ),
        )
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
        (["predict", "{run}", "nowhere.png", "--out", "out"], "nowhere.png"),
        (["predict", "{run}", "{data}", "--out", "{data}"], "not empty"),
    ],
)
def test_the_command_line_says_it_in_one_line(arguments, words, tiny_data, tiny_run, tmp_path, monkeypatch, capsys):
    import re

    monkeypatch.chdir(tmp_path)
    assert main([text.format(data=tiny_data, run=tiny_run) for text in arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("bkd-fast: ")
    assert re.search(words, error), error
    assert not list(tmp_path.iterdir())


@pytest.fixture
def copied_run(tiny_run, tmp_path):
    return shutil.copytree(tiny_run, tmp_path / "run")


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
        (lambda run: change_config(run, lambda m: m.update(format=99)), "format 99.*reads format 5"),
        (
            lambda run: change_config(run, lambda m: m.pop("calibration")),
            "the manifest has bkd_fast, files, source: expected bkd_fast, calibration, files, source",
        ),
        (lambda run: (run / "config.toml").write_text("[memory]"), "config.toml was altered"),
        (lambda run: (run / "manifest.json").write_text('{"format": 4}'), "run format 4.*reads format 5: train again"),
        (lambda run: (run / "support/999.png").write_bytes(b""), "does not belong to the run"),
        (lambda run: _linked(run / "model.safetensors"), "no symbolic links"),
        (lambda run: (run / "manifest.json").rename(run / "config.json"), "written by an earlier bkd_fast"),
        (lambda run: (run / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda run: next((run / "support").iterdir()).unlink(), "support/.* is missing"),
        (lambda run: (run / "model.safetensors").write_bytes(b"0" * 64), "was altered"),
    ],
)
def test_a_damaged_run_folder(damage, words, copied_run):
    damage(copied_run)
    with pytest.raises(BKDError, match=words):
        load_trained(copied_run)


def test_an_unfinished_run_says_how_to_go_on(tmp_path):
    (tmp_path / "checkpoint.safetensors").write_bytes(b"")
    with pytest.raises(BKDError, match="--resume"):
        load_trained(tmp_path)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((8, 8, 4), np.uint8), "(8, 8, 4)"),
        (np.zeros((8, 8), np.float32), "float32"),
        (np.zeros((0, 8, 3), np.uint8), "(0, 8, 3)"),
        (7, "int"),
    ],
)
def test_what_is_not_an_image(tiny_run, image, words):
    import re

    with pytest.raises(BKDError, match=re.escape(words)):
        Detector.load(tiny_run)(image)


def test_tensors_out_of_range(tiny_run):
    import torch

    detector = Detector.load(tiny_run)
    for bad in (torch.full((3, 64, 64), 200.0), torch.full((3, 64, 64), float("nan"))):
        with pytest.raises(BKDError, match=r"outside \[0, 1\] or NaN"):
            detector(bad)
    with pytest.raises(BKDError, match=r"\(4, 64, 64\)"):
        detector(torch.zeros(4, 64, 64))


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
