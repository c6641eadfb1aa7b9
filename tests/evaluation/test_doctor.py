"""What the doctor says of data that is sound, and of each thing that is not."""

import shutil

import numpy as np
import pytest
from PIL import Image

from bkd_fast.cli import main
from bkd_fast.config import BKDConfig
from bkd_fast.evaluation import doctor
from bkd_fast.evaluation.doctor import examine

CONFIG = BKDConfig().with_changes(
    {"teacher.name": "test_resnet", "teacher.weights": "none", "teacher.image_size": (64, 64), "memory.items": 16}
)


@pytest.fixture
def parts(tmp_path):
    """A folder of twelve good images."""
    generator = np.random.default_rng(0)
    folder = tmp_path / "parts"
    folder.mkdir()
    for index in range(12):
        Image.fromarray(generator.integers(0, 255, (70, 80, 3), dtype=np.uint8)).save(folder / f"{index:02}.png")
    return folder


def said(findings, state, topic=None):
    return " | ".join(one.text for one in findings if one.state == state and topic in (None, one.topic))


def test_sound_images_have_nothing_that_stops(parts):
    findings = examine(parts, CONFIG.with_changes({"training.false_alarms": 0.1}))
    assert not said(findings, "stop")
    assert not said(findings, "warning", "parts")
    assert "12 good images to learn from, 12 PNG, 70 x 80 pixels" in said(findings, "ok", "parts")
    assert "the teacher takes about" in said(findings, "ok", "parts")
    assert {"versions", "kernels", "teacher", "weights", "memory", "disk"} <= {one.topic for one in findings}


def test_odd_images_and_copies_are_named(parts):
    shutil.copy(parts / "00.png", parts / "copy.png")
    near = np.asarray(Image.open(parts / "01.png")).copy()
    near[0, 0] ^= 1
    Image.fromarray(near).save(parts / "near.png")
    Image.open(parts / "02.png").convert("L").save(parts / "grey.png")
    Image.open(parts / "03.png").transpose(Image.Transpose.ROTATE_90).save(parts / "turned.png")
    warnings = said(examine(parts, CONFIG), "warning", "parts")
    assert "1 duplicates: copy.png = 00.png" in warnings
    assert "1 pairs of near duplicates, of one part each?: 01.png ~ near.png" in warnings
    assert "1 of another size than 70 x 80: turned.png" in warnings
    assert "1 of another mode than RGB: grey.png" in warnings


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "12 scores of good images for thresholds; 1 % false alarms take 99: expect about 7.7 %"),
        ({"memory.learned": True, "training.validation_share": 0.25}, "3 scores of good images"),
    ],
)
def test_too_few_images_for_the_false_alarms_asked(parts, changes, expected):
    """The same numbers as training ends with."""
    assert expected in said(examine(parts, CONFIG.with_changes(changes)), "warning", "parts")


def test_what_stops_a_training(parts, tmp_path, monkeypatch):
    assert "there is no folder" in said(examine(tmp_path / "none", CONFIG), "stop", "data")
    (parts / "broken.png").write_bytes(b"no image")
    assert "1 images cannot be read: " in said(examine(parts, CONFIG), "stop", "parts")
    tiles = CONFIG.with_changes({"teacher.tile": 100})
    assert "smaller than a tile" in said(examine(parts, tiles), "stop", "parts")
    shots = CONFIG.with_changes({"support": "sampled", "support.shots": 50})
    assert said(examine(parts, shots), "stop", "parts")
    odd = CONFIG.with_changes({"teacher.name": "test_vit", "teacher.image_size": (65, 65)})
    assert "Choose teacher.image_size 64 x 64 or 80 x 80" in said(examine(parts, odd), "stop", "teacher")
    missing = CONFIG.with_changes({"teacher.weights": str(tmp_path / "none.pth")})
    assert "there is no file" in said(examine(parts, missing), "stop", "weights")
    monkeypatch.setattr(doctor, "TRAINING", ("no_such_package",))
    assert "pip install 'bkd_fast[train]'" in said(examine(None, CONFIG), "stop", "packages")


def test_the_exit_status_says_whether_a_training_would_stop(parts, capsys):
    options = ["--teacher", "test_resnet", "--weights", "none", "--image-size", "64"]
    assert main(["doctor", str(parts), *options]) == 0
    assert capsys.readouterr().out.startswith("ok ")
    (parts / "broken.png").write_bytes(b"no image")
    assert main(["doctor", str(parts), *options]) == 1
    assert "stop     parts" in capsys.readouterr().out
