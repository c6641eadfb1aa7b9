"""What a notebook shows: tables and heat maps, escaped, and bars that move."""

import base64
import io
import re
from dataclasses import replace
from html import unescape
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from bkd_fast.config import BKDConfig
from bkd_fast.data import progress
from bkd_fast.inference.detector import Detector
from bkd_fast.inference.heat import HeatScale


@pytest.fixture(scope="module")
def detector(tiny_run):
    return Detector.load(tiny_run, device="cpu")


def cells(html):
    return {name: unescape(value) for name, value in re.findall(r"<th[^>]*>(.*?)</th><td[^>]*>(.*?)</td>", html)}


def picture(html):
    (data,) = re.findall(r'<img [^>]*src="data:image/png;base64,([^"]+)"', html)
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_a_detector_shows_what_it_decides_by(detector):
    shown = cells(detector._repr_html_())
    assert shown["teacher"] == "test_resnet"
    assert shown["image size"] == "64 × 64"
    assert shown["trained from"] == "8 good images"
    assert float(shown["threshold"]) == pytest.approx(detector.threshold, rel=1e-4)
    assert float(shown["pixel threshold"]) == pytest.approx(detector.pixel_threshold, rel=1e-4)
    assert shown["thresholds from"] == "10 good images (leave-one-out)"
    assert shown["device"] == "cpu"


def test_names_are_escaped(detector, monkeypatch):
    config = BKDConfig()
    teacher = replace(config.teacher)
    object.__setattr__(teacher, "name", "<script>alert(1)</script>")
    monkeypatch.setattr(detector, "config", replace(config, teacher=teacher))
    html = detector._repr_html_()
    assert "<script>" not in html
    assert cells(html)["teacher"] == "<script>alert(1)</script>"


def test_a_prediction_shows_its_heat_map(detector, tiny_data):
    prediction = detector(tiny_data / "test/hole/000.png")
    html = prediction._repr_html_()
    shown = cells(html)
    assert shown["decision"] == ("anomalous" if prediction.label else "normal")
    assert float(shown["score"]) == pytest.approx(prediction.score, rel=1e-4)
    level, threshold = detector.calibration.normal_level, detector.pixel_threshold
    expected = HeatScale(level, threshold**2 / level).colours(prediction.anomaly_map)
    assert np.array_equal(picture(html), expected)
    assert not np.array_equal(picture(detector(tiny_data / "test/good/000.png")._repr_html_()), expected)


def test_a_large_map_becomes_a_small_picture(detector):
    large = np.random.default_rng(0).integers(0, 255, (600, 1200, 3)).astype(np.uint8)
    assert picture(detector(large)._repr_html_()).shape == (128, 256, 3)


def test_without_a_scale_there_is_no_picture(detector, tiny_data, monkeypatch):
    monkeypatch.setattr(detector, "pixel_threshold", -1.0)  # as a program may set it
    html = detector(tiny_data / "test/hole/000.png")._repr_html_()
    assert "<img" not in html
    assert "decision" in html


@pytest.fixture
def notebook(monkeypatch):
    """IPython as a kernel has it."""
    shell = SimpleNamespace(kernel=object())
    monkeypatch.setitem(progress.sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))


def test_a_bar_moves_in_a_notebook(notebook, capsys):
    assert progress.is_watched()
    with progress.progress_bar(2, "features", "image", None) as bar:
        bar.update()
        bar.update()
    shown = capsys.readouterr().err
    assert "features: 100%" in shown
    assert "2/2" in shown


def test_elsewhere_there_are_lines(capsys, monkeypatch):
    monkeypatch.delitem(progress.sys.modules, "IPython", raising=False)
    assert not progress.is_watched()
    with progress.progress_bar(2, "features", "image", None) as bar:
        bar.update()
    assert "features" not in capsys.readouterr().err  # the first line comes after 30 seconds


def test_asked_for_nothing_a_notebook_shows_nothing(notebook, capsys):
    with progress.progress_bar(2, "features", "image", False) as bar:
        bar.update()
    assert capsys.readouterr().err == ""
