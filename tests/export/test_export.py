"""Exported files, each in its run-time, against the detector."""

import json
import sys

import numpy as np
import pytest
import tiny
import torch

import bkd_fast.export as exporting
from bkd_fast.benchmark.model import random_model, untrained
from bkd_fast.cli import main
from bkd_fast.config import BKDConfig
from bkd_fast.data import load_image, to_tensor
from bkd_fast.errors import BKDError
from bkd_fast.export import description, export
from bkd_fast.export.formats import read, write
from bkd_fast.export.graph import program
from bkd_fast.export.settings import parse
from bkd_fast.inference.detector import Detector

FORMATS = ["pt2", "onnx", *(pytest.param(name, marks=pytest.mark.slow) for name in ("openvino", "aoti"))]


def agrees(run, data, format, path):
    detector, judge = Detector.load(run, device="cpu"), read(format, path)
    files = sorted((data / "test").rglob("*.png"))
    assert len(files) == 6
    for count in (1, 2, 6):
        batch = torch.stack([to_tensor(load_image(file), detector.config.teacher.size) for file in files[-count:]])
        for found, expected in zip(judge(batch.numpy()), detector.score(batch), strict=True):
            assert found.shape == tuple(expected.shape)
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3 * expected.abs().max().item())


@pytest.mark.parametrize("format", FORMATS)
def test_files_agree_with_the_detector_for_any_number_of_images(format, tiny_default_run, tiny_data, tmp_path, capsys):
    suffix = {"openvino": "xml", "onnx": "onnx"}.get(format, "pt2")
    path = tmp_path / "exported" / f"parts.{suffix}"
    assert main(["export", str(tiny_default_run), "--format", format, "--out", str(path)]) == 0
    assert "map error, max" in capsys.readouterr().out
    agrees(tiny_default_run, tiny_data, format, path)
    detector = Detector.load(tiny_default_run)
    described = json.loads(description(path).read_text())
    assert (described["threshold"], described["pixel_threshold"]) == (detector.threshold, detector.pixel_threshold)
    assert described["input_size"] == [*detector.config.teacher.size]
    assert described["runtime"] == ({"INFERENCE_PRECISION_HINT": "f32"} if format == "openvino" else {})
    assert described.pop("check")["images"] == 3  # two validation images, and one with a mark
    assert parse(read(format, path).metadata, path) == described
    if format == "openvino":  # the same in the model, and its layers are marked as float32 ones
        text = path.read_text()
        assert '<INFERENCE_PRECISION_HINT value="f32"' in text
        assert text.count("<layer ") == text.count('name="precise"')
    expected = {"openvino": {"xml", "bin", "json"}}.get(format, {suffix, "json"})
    assert {one.suffix[1:] for one in path.parent.iterdir()} == expected


# What the default model has not, of each part of the network, and whether DeformConv has to do with it.
FULL = {"alignment.kernel": "full"}
SAMPLED = {"support": "sampled", "support.per": "step"}
SEPARATE = {"teacher.levels": "separate"}
ATTENTION = {"memory.read": "attention"}
MAP_ALONE = {"anomaly_map.image_weight": 0.0, "anomaly_map.top_fraction": 0.0}
WINDOW = {"support.match_radius": 3, "support.neighbors": 2, "memory.neighbors": 3, "teacher.image_size": (72, 50)}
ONE = {"support.shots": 1, "memory.neighbors": 1, "teacher.border": 0.5, "teacher.scale": "channel"}
CLOSEST = {"support.aggregation": "min"}
CHANGES = {
    "masks, the closest of sampled shots, odd sizes": (
        {**FULL, **SAMPLED, **CLOSEST, "alignment.modulated": True, "teacher.image_size": (80, 72)},
        True,
    ),
    "the closest of shots that are retrieved, refined; cosines; memory by attention": (
        {**FULL, **CLOSEST, **ATTENTION, **MAP_ALONE, "support.shots": 3, "anomaly_map.distance": "cosine"},
        True,
    ),
    "matched in a wide window, odd sizes": (WINDOW, False),
    "one shot and one item, level by level, every channel by itself": ({**ONE, **SEPARATE}, False),
    "a student behind a match that is refined": (
        {**FULL, **SEPARATE, **ATTENTION, "student": "on", "memory.learned": True},
        True,
    ),
    "pure warp of sampled supports": ({**SAMPLED, "alignment.kernel": "identity"}, True),
    "forward branch alone": ({"memory": None, "student": None}, False),
    "reverse branch alone": ({"support": None}, False),
    "as printed": (BKDConfig.preset("paper").to_dict(), False),
    "reverse branch alone, no memory": (
        {**SEPARATE, "support": None, "memory": None, "student": "on", "student.correction": False},
        False,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGES)
def test_other_models_can_be_exported(name, tmp_path):
    """To ONNX, without training: random weights."""
    changes, deform_conv = CHANGES[name]
    small = tiny.TINY
    printed = small if name == "as printed" else {}
    config = BKDConfig().with_changes(small).with_changes(changes).with_changes(printed)
    model, batch = random_model(config, 3, "cpu")
    support = model.support_levels(torch.rand(4, 3, *config.teacher.size))
    detector = Detector(untrained(model, support, batch[:1]), "cpu", pack=False)
    batch = 0.9 * batch.flip(-1)  # not what the memory holds: distances of zero are rounding
    for option in (False, True)[: 1 + deform_conv]:
        path = tmp_path / f"{option}.onnx"
        write(program(detector), "onnx", path, deform_conv=option)
        for found, expected in zip(read("onnx", path)(batch.numpy()), detector.score(batch), strict=True):
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3 * expected.abs().max().item())


def test_onnx_has_standard_operators_alone(tiny_run, tiny_data, tmp_path):
    onnx = pytest.importorskip("onnx")
    for deform_conv, sampler, version in ((False, "GridSample", 18), (True, "DeformConv", 19)):
        path, _ = export(tiny_run, "onnx", tmp_path / f"{sampler}.onnx", deform_conv=deform_conv)
        agrees(tiny_run, tiny_data, "onnx", path)
        model = onnx.load(path)
        onnx.checker.check_model(model, full_check=True)
        assert [(one.domain, one.version) for one in model.opset_import if one.domain == ""] == [("", version)]
        assert not {node.domain for node in model.graph.node} - {"", "ai.onnx"}
        assert sampler in {node.op_type for node in model.graph.node}


def test_each_format_has_its_own_description(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "program", lambda _: None)
    monkeypatch.setattr(exporting, "write", lambda _, format, path, **__: path.write_text(format))
    monkeypatch.setattr(exporting, "read", lambda *_: None)
    for format, name in (("onnx", "model.onnx"), ("pt2", "model.pt2"), ("aoti", "model.aoti.pt2")):
        path, _ = export(tiny_run, format, tmp_path / name)
        assert json.loads(description(path).read_text())["format"] == path.read_text() == format
    assert len(list(tmp_path.iterdir())) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "tflite"}, "no export format 'tflite': choose one of pt2, aoti, onnx, openvino"),
        ({"format": "pt2", "deform_conv": True}, "deform_conv is an option of the format onnx, not of pt2"),
        ({"format": "onnx", "out": "model.pb"}, "model.pb does not end in .onnx"),
    ],
)
def test_wrong_requests_are_errors(arguments, message, tiny_run):
    with pytest.raises(BKDError, match=message):
        export(tiny_run, **arguments)


@pytest.mark.parametrize(("format", "package"), [("onnx", "onnxscript"), ("openvino", "openvino")])
def test_a_missing_package_is_named(format, package, tiny_run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    path = tmp_path / f"model.{'onnx' if format == 'onnx' else 'xml'}"
    with pytest.raises(BKDError, match=rf"export to {format} needs {package}: .*bkd_fast\[export\]"):
        export(tiny_run, format, path)
    assert not list(tmp_path.iterdir())


def test_a_file_that_does_not_agree_is_an_error(tiny_run, tmp_path, monkeypatch):
    from bkd_fast.ops.anomaly_map import reference

    original = reference.cosine_anomaly_map
    monkeypatch.setattr(reference, "cosine_anomaly_map", lambda *arguments: 1.1 * original(*arguments))
    for there in (False, True):
        if there:
            (tmp_path / "model.pt2").write_text("of an earlier export")
        with pytest.raises(BKDError, match="nothing was written: .* differs from the run .* map error, max is"):
            export(tiny_run, "pt2", tmp_path / "model.pt2")
        assert [one.read_text() for one in tmp_path.iterdir()] == ["of an earlier export"] * there
