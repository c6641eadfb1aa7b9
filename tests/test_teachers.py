"""Every kind of backbone from training to another run-time, with random weights."""

import json

import numpy as np
import pytest
import tiny

from bkd_fast.cli import main
from bkd_fast.config import BKDConfig
from bkd_fast.data import load_image
from bkd_fast.errors import BKDError
from bkd_fast.evaluation.report import render_inside
from bkd_fast.export import export
from bkd_fast.inference.detector import Detector
from bkd_fast.inference.explain import explain
from bkd_fast.training.train import train

slow = pytest.mark.slow
# Name -> (image size that is asked for, the one that is taken, strides of the levels).
TEACHERS = {
    "test_efficientnet": (64, 64, (4, 8, 16)),
    "test_convnext": (64, 64, (4, 8, 16)),
    "test_vit": (64, 64, (16, 16, 16)),
    "tf_efficientnet_lite0": (64, 64, (4, 8, 16)),
    "convnext_atto": (64, 64, (4, 8, 16)),
    "swin_tiny_patch4_window7_224": (64, 64, (4, 8, 16)),
    "vit_small_patch14_dinov2": (70, 70, (14, 14, 14)),
    "vit_small_patch14_reg4_dinov2": (None, 252, (14, 14, 14)),
    "vit_small_patch16_dinov3": (64, 64, (16, 16, 16)),
    "deit_tiny_patch16_224": (None, 256, (16, 16, 16)),
}
FAST = ("test_efficientnet", "test_convnext", "test_vit")  # exported in the slow tests alone


def configured(name, size, changes=None):
    own = {"teacher.name": name, "teacher.image_size": None if size is None else (size, size), "training.epochs": 1}
    return BKDConfig().with_changes({**tiny.TINY, **own, **(changes or {})})


@pytest.mark.parametrize("name", [name if name in FAST else pytest.param(name, marks=slow) for name in TEACHERS])
def test_a_teacher_goes_all_the_way(name, tiny_data, tmp_path):
    asked, size, strides = TEACHERS[name]
    run = train(tiny_data, tmp_path / "run", configured(name, asked), progress=False)
    assert main(["evaluate", str(run)]) == 0
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics
    detector = Detector.load(run, device="cpu")
    assert detector.config.teacher.image_size == (size, size)
    assert detector.model.teacher.strides == strides
    picture = next((tiny_data / "test" / "hole").iterdir())
    prediction = detector(picture)
    assert prediction.anomaly_map.shape == load_image(picture).shape[:2]
    assert np.isfinite(prediction.anomaly_map).all()
    assert prediction.anomaly_map.std() > 0
    assert detector(picture, tile=48, overlap=8).anomaly_map.shape == load_image(picture).shape[:2]
    if name not in FAST:
        agrees(run, "onnx", tmp_path)


def agrees(run, format, folder):
    """The exported file computes what the detector does."""
    suffix = "onnx" if format == "onnx" else "xml" if format == "openvino" else "pt2"
    _, comparison = export(run, format, folder / f"model.{suffix}")
    assert comparison is not None
    assert not comparison.failures


BLOCKS = {"teacher.layers": ["blocks.1", 3, -1]}  # of equal stride
SEPARATE, ALIGNED = {"teacher.levels": "separate"}, {"alignment.kernel": "full"}
ATTENTION = {"memory.read": "attention", "memory.learned": True}
PARTS = {
    "three levels": BLOCKS,
    "one level": {"teacher.layers": [2]},
    "five levels": {"teacher.layers": [0, 1, 2, 3, 4]},
    "compared one by one": {**BLOCKS, **SEPARATE},
    "aligned": {**BLOCKS, **ALIGNED},
    "aligned one by one, memory by attention": {**BLOCKS, **SEPARATE, **ALIGNED, **ATTENTION},
    "sampled supports": {**BLOCKS, **SEPARATE, "support": "sampled", "alignment": "on", "alignment.cascade": "product"},
    "cosines": {**BLOCKS, **SEPARATE, "anomaly_map.distance": "cosine", "anomaly_map.fusion": "sum"},
}


def trained(part, data, folder):
    return train(data, folder / "run", configured("test_vit", 64, PARTS[part]), progress=False)


@pytest.mark.parametrize("part", PARTS)
def test_levels_of_equal_stride_work_with_every_part(part, tiny_data, tmp_path):
    detector = Detector.load(trained(part, tiny_data, tmp_path), device="cpu")
    picture = next((tiny_data / "test" / "hole").iterdir())
    assert np.isfinite(detector(picture).anomaly_map).all()
    found, separate = explain(detector, picture), detector.config.teacher.levels == "separate"
    assert len(detector.model.teacher.channels) == len(PARTS[part]["teacher.layers"])
    shown = {"blocks.1", "blocks.3", "blocks.5"} if separate else {16}
    assert {view for views in found.distances.values() for view in views} == shown
    assert set(found.aligned) == shown
    assert set(found.offsets) == (shown if detector.config.alignment is not None else set())
    for offset in found.offsets.values():
        assert offset.shape == (2, 4, 4)
    assert render_inside(load_image(picture), found).dtype == np.uint8


@slow
@pytest.mark.parametrize("part", PARTS)
def test_levels_of_equal_stride_can_be_exported(part, tiny_data, tmp_path):
    agrees(trained(part, tiny_data, tmp_path), "onnx", tmp_path)


@slow
@pytest.mark.parametrize("format", ["pt2", "openvino", "aoti"])
def test_a_vision_transformer_runs_elsewhere(format, tiny_data, tmp_path):
    agrees(trained("aligned", tiny_data, tmp_path), format, tmp_path)


@slow
def test_a_vision_transformer_can_be_compiled(tiny_data, tmp_path):
    run = trained("aligned", tiny_data, tmp_path)
    picture = next((tiny_data / "test" / "hole").iterdir())
    compiled = Detector.load(run, device="cpu", compile="default")
    plain = Detector.load(run, device="cpu")
    assert compiled(picture).score == pytest.approx(plain(picture).score, rel=1e-3)


@pytest.mark.parametrize("layers", [[1, 2, 3], [2, 3]])
def test_a_student_needs_strides_that_double(layers, tiny_data, tmp_path):
    """And says so before anything is written."""
    changes = {"teacher.layers": layers, **SEPARATE, "student": "on", "support": None}
    with pytest.raises(BKDError, match=r"student rebuilds three levels .* test_vit are 16, 16.*student=none"):
        train(tiny_data, tmp_path / "run", configured("test_vit", 64, changes))
    assert not (tmp_path / "run").exists()


def test_a_student_rebuilds_coarser_levels(tiny_data, tmp_path):
    changes = {"teacher.strides": [8, 16, 32], **SEPARATE, "student": "on"}
    detector = Detector.load(train(tiny_data, tmp_path / "run", configured("test_resnet", 64, changes)), device="cpu")
    picture = next((tiny_data / "test" / "hole").iterdir())
    assert detector.model.strides == (8, 16, 32)
    assert np.isfinite(detector(picture).anomaly_map).all()


def test_levels_and_sizes_on_the_command_line(tiny_data, tmp_path, capsys):
    command = ["train", str(tiny_data), "--teacher", "test_vit", "--weights", "none", "--out"]
    options = ["--image-size", "64", "--set", "memory.items=16"]
    assert main([*command, str(tmp_path / "a"), *options, "--layers", "blocks.1", "-1"]) == 0
    teacher = Detector.load(tmp_path / "a", device="cpu").config.teacher
    assert (teacher.layers, teacher.image_size) == (("blocks.1", -1), (64, 64))
    assert main([*command, str(tmp_path / "b"), "--image-size", "65"]) == 1
    assert "Choose teacher.image_size 64 x 64 or 80 x 80" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "b"), *options, "--strides", "16", "--layers", "1"]) == 1
    assert "set one of them" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
