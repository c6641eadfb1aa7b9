"""The page: valid, self-contained, escaped, honest about what is absent, and small however many images there are."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest

from bkd_fast.errors import BKDError
from bkd_fast.evaluation.metrics import METRIC_NAMES, image_metrics
from bkd_fast.evaluation.report import CategoryReport, HeatScale, ImageRecord, write_overlay, write_report
from bkd_fast.evaluation.report.gallery import BUDGET, by_outcome, chosen
from bkd_fast.evaluation.report.plots import Axis

VOID = {"meta", "img", "br", "input", "line", "polyline", "rect", "circle"}
NOTHING = dict.fromkeys(METRIC_NAMES)
CURVE = (np.array([0.0, 0.1, 0.3]), np.array([0.0, 0.8, 0.95]))
LOG = [{"epoch": epoch, "total": 2.0 / epoch, "forward": 1.0 / epoch, "seconds": 3.0} for epoch in range(1, 6)]


class Page(HTMLParser):
    """Fails on tags that do not nest; keeps what tests ask about."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data.strip())

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


def records(good: int, bad: int, *, seed: int = 0, overlay: Path | None = None) -> list[ImageRecord]:
    generator = np.random.default_rng(seed)
    return [
        ImageRecord(f"{defect}/{index:03}.png", defect, label, score, int(score > 0.5), overlay)
        for index, (label, defect) in enumerate([(0, "good")] * good + [(1, "hole")] * bad)
        for score in [generator.uniform(0.2 * label, 0.7 + 0.3 * label)]
    ]


def category(images: list[ImageRecord], name: str = "tile", **options) -> CategoryReport:
    computed = {**NOTHING, **image_metrics([image.label for image in images], [image.score for image in images])}
    defaults = {"branches": {"forward": computed, "both": computed}, "threshold": 0.5, "log": LOG, "seconds": 75.2}
    return CategoryReport(name, computed, images=images, **{**defaults, **options})


def write(tmp_path: Path, *categories: CategoryReport, **options) -> tuple[Page, str]:
    path = tmp_path / "report.html"
    defaults = {"title": "Test", "mean": NOTHING, "config": {}, "environment": {}}
    write_report(path, categories=categories, **{**defaults, **options})
    text = path.read_text(encoding="utf-8")
    return Page(text), text


def coordinates(page: Page) -> list[float]:
    names = ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "width", "height")
    values = [
        attributes[name]
        for tag, attributes in page.tags
        if tag in VOID - {"img", "input"}
        for name in names
        if name in attributes
    ]
    values += [number for line in page.all("polyline") for number in re.split("[ ,]", line["points"])]
    return [float(value) for value in values]


@pytest.fixture
def overlay(tmp_path: Path) -> Path:
    path = tmp_path / "overlays" / "tile" / "hole 1#.png"
    write_overlay(path, np.random.default_rng(0).integers(0, 255, (200, 500, 3)).astype(np.uint8))
    return path


def test_a_whole_report_is_valid_and_loads_nothing(tmp_path, overlay):
    parts = category(records(30, 30, overlay=overlay), roc=CURVE, pro=CURVE, train_count=12, notes=["3 have no mask"])
    page, text = write(
        tmp_path,
        parts,
        category(records(5, 5), "other"),
        mean={**NOTHING, "image_auroc": 0.9314},
        config={"teacher": "resnet18", "image_size": (64, 96), "weights": None},
        environment={"torch": {"version": "2.x"}},
        heat_scale=HeatScale(0.1, 10, unit="times the threshold"),
    )
    assert not re.search(r"https?://|@import|url\(|<script[^>]+src|<link|<iframe", text)
    assert "color-scheme: light dark" in text  # the style sheet is in the page
    assert all(image["src"].startswith("data:image/jpeg;base64,") for image in page.all("img"))
    assert page.all("img")
    words = {"93.1", "3 have no mask", "64, 96", "torch.version", "1 min 15 s", "times the threshold, logarithmic"}
    assert words | {"Image scores", "ROC", "Per-region overlap (PRO)", "Training loss"} <= set(page.words)
    values = coordinates(page)
    assert len(values) > 100
    assert all(math.isfinite(value) and -1 <= value <= 321 for value in values)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["overlays", "report.html"]


def test_overlays_are_linked_relative_to_the_page(tmp_path, overlay):
    page, _ = write(tmp_path, category(records(0, 1, overlay=overlay)))
    links = [link["href"] for link in page.all("a") if not link["href"].startswith("#")]
    assert links == ["overlays/tile/hole%201%23.png"]


def test_every_text_is_escaped(tmp_path):
    evil = '<script>alert("&")</script>'
    image = ImageRecord(name=evil, defect=evil, label=1, score=1.0, decision=1)
    page, text = write(
        tmp_path,
        category([image], evil, notes=[evil], branches={evil: NOTHING}),
        title=evil,
        config={evil: evil, "list": [evil]},
        environment={"nested": {evil: evil}},
        heat_scale=HeatScale(0, 1, log=False, unit=evil),
    )
    assert "<script>alert" not in text
    assert [script.get("type") for script in page.all("script")] == ["application/json", None]
    assert text.count("&lt;script&gt;alert") >= 12
    assert evil in page.words


def test_absent_metrics_are_shown_as_absent(tmp_path):
    page, text = write(tmp_path, category(records(4, 0)))
    assert "–" in page.words
    assert not re.search(r">(nan|None|inf)<", text)
    assert {"Missed defects", "Found defects", "ROC", "Per-region overlap (PRO)"}.isdisjoint(page.words)
    assert "Good images" in page.words


@pytest.mark.parametrize(("good", "bad"), [(0, 0), (0, 3), (1, 0), (1, 1)])
def test_small_and_one_sided_test_sets(tmp_path, good, bad):
    page, _ = write(tmp_path, category(records(good, bad), log=[], seconds=None))
    assert any("no test images" in word for word in page.words) == (good + bad == 0)
    assert all(math.isfinite(value) for value in coordinates(page))


def test_no_category_at_all(tmp_path):
    page, _ = write(tmp_path)
    assert "0 categories, 0 test images: 0 defective (0 missed), 0 good (0 false alarms)." in page.words


@pytest.mark.parametrize(
    "scores", [[0.0, 0.0], [1e-12, 3e4], [5.0, 5.0], [-2.0, 7.0], [1e-30, 1.1e-30], [1e30, 1.0], [0.9, 30.0]]
)
def test_charts_stay_finite_whatever_the_scores(tmp_path, scores):
    images = [ImageRecord(str(index), "good", index, score, 0) for index, score in enumerate(scores)]
    log = [{"epoch": 1, "total": math.nan}, {"epoch": 2, "total": 3.0}, {"epoch": 3}]
    page, _ = write(tmp_path, category(images, log=log, threshold=scores[0]))
    values = coordinates(page)
    assert all(math.isfinite(value) and -1 <= value <= 321 for value in values)
    assert len(page.all("circle")) == 1
    assert sum("bar" in bar.get("class", "") for bar in page.all("rect")) >= 2


def test_ticks_are_round_and_inside():
    assert Axis(0, 1, "").ticks() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert Axis(0, 0.3, "").ticks() == pytest.approx([0, 0.1, 0.2, 0.3])
    assert Axis(2e-4, 5e-1, "", log=True).ticks() == pytest.approx([1e-3, 1e-2, 1e-1])
    assert Axis(2, 9, "", log=True).ticks() == pytest.approx([2, 18**0.5, 9])


def test_worst_misses_and_false_alarms_come_first():
    images = records(200, 200, seed=1)
    picked = chosen(by_outcome(images), 24)
    assert list(picked) == ["Missed defects", "False alarms", "Found defects", "Good images"]
    assert [len(group) for group in picked.values()] == [8, 8, 4, 4]
    missed = sorted(image.score for image in images if image.label and not image.decision)
    alarms = sorted((image.score for image in images if not image.label and image.decision), reverse=True)
    assert [image.score for image in picked["Missed defects"]] == missed[:8]
    assert [image.score for image in picked["False alarms"]] == alarms[:8]
    assert len({image.name for group in picked.values() for image in group}) == 24


def test_an_outcome_without_images_leaves_its_places_to_others():
    picked = chosen(by_outcome([image for image in records(100, 100) if bool(image.label) == bool(image.decision)]), 24)
    assert [len(group) for group in picked.values()] == [0, 0, 20, 4]


def test_many_images_and_categories_stay_bounded(tmp_path, overlay, monkeypatch):
    one, _ = write(tmp_path, category(records(400, 400, overlay=overlay)))
    assert len(one.all("img")) == 24
    monkeypatch.setattr("bkd_fast.evaluation.report.gallery.thumbnail", lambda path, width: bytes(100_000))
    many, text = write(tmp_path, *(category(records(300, 300, overlay=overlay), f"c{index}") for index in range(20)))
    assert len(text) < BUDGET + 500_000 + 100 * 12_000 < 8_000_000  # pictures, markup, data of every image
    assert 20 <= len(many.all("img")) <= 5_500_000 // 130_000
    assert "open the picture" in many.words


def test_an_overlay_that_is_not_there_is_named_and_the_old_report_survives(tmp_path, overlay):
    write(tmp_path, category(records(1, 1)), title="Old")
    overlay.unlink()
    with pytest.raises(BKDError, match=r"overlay .*hole 1#\.png of image good/000\.png cannot be read"):
        write(tmp_path, category(records(1, 0, overlay=overlay)), title="New")
    assert "<title>Old</title>" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_threshold_must_be_finite():
    with pytest.raises(BKDError, match="threshold of tile is nan"):
        category([], threshold=math.nan)


def tiles(text: str) -> list[tuple[str, str]]:
    return re.findall(r"<div><b>([^<]*).*?</b><span>(.*?)</span></div>", text)


def test_the_first_tiles_say_what_the_thresholds_do(tmp_path):
    images = records(8, 4, seed=3)
    detected = sum(image.decision for image in images if image.label) / 4
    alarms = sum(image.decision for image in images if not image.label) / 8
    made = category(images)
    shown = tiles(write(tmp_path, made, mean=made.metrics)[1])
    assert [label for _, label in shown] == ["Defects found", "False alarms", "Image AUROC", "Pixel AUROC", "AUPRO"]
    assert [float(value) for value, _ in shown[:3]] == pytest.approx(
        [100 * detected, 100 * alarms, 100 * made.metrics["image_auroc"]], abs=0.06
    )
    assert [value for value, _ in shown[3:]] == ["–", "–"]


def test_the_tiles_of_several_categories_are_means(tmp_path):
    one = [ImageRecord("a", "hole", 1, 1.0, 1), ImageRecord("b", "good", 0, 0.0, 0)]
    other = [ImageRecord("a", "hole", 1, 0.0, 0), ImageRecord("b", "good", 0, 0.0, 0)]
    shown = tiles(write(tmp_path, category(one), category(other, "other"), category([], "empty"))[1])
    assert shown[:2] == [("50.0", "Defects found, mean"), ("0.0", "False alarms, mean")]


@pytest.mark.parametrize(
    "name",
    ['"><img src=x onerror=alert(1)>.png', "' onmouseover='alert(1)", "{{ 7 * 7 }}{% raise %}", "&lt;b&gt; #?%.png"],
)
def test_a_hostile_file_name_is_text_and_its_link_opens_the_file(tmp_path, name):
    path = tmp_path / "overlays" / "javascript:alert(1)" / name
    write_overlay(path, np.zeros((60, 90, 3), np.uint8))
    image = ImageRecord(name, "hole", 1, 1.0, 1, path)
    page, _ = write(tmp_path, category([image], inside=[image]))
    assert page.words.count(name) == 2
    assert len(page.all("img")) == 2
    assert not [tag for tag, attributes in page.tags if any(key.startswith("on") for key in attributes)]
    assert {picture["alt"] for picture in page.all("img")} == {f"{name}: image, heat map, outlines"}
    links = [unquote(link["href"]) for link in page.all("a") if not link["href"].startswith("#")]
    assert [tmp_path / link for link in links] == [path, path]
    assert all(link.startswith("overlays/") for link in links)
