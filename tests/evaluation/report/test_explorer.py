"""The threshold explorer: its data in the page, and the page in a real browser."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bkd_fast.decisions import NormalScores, threshold_for
from bkd_fast.errors import BKDError
from bkd_fast.evaluation.metrics import METRIC_NAMES
from bkd_fast.evaluation.report import CategoryReport, ImageRecord, write_overlay, write_predictions, write_report
from bkd_fast.evaluation.report.explorer import BINS, explorer

NOTHING = dict.fromkeys(METRIC_NAMES)
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
EVIL = [
    "</script><script>document.title='broken'</script>.png",
    "<!--<script>.png",
    "a\u2028b\u2029.png",
    "\"><img src=x onerror=document.title='broken'>",
    "{{ 7 * 7 }} ' & \\ \\u003c",
]


def images(good: list[float], bad: list[float], threshold: float, overlay: Path | None = None) -> list[ImageRecord]:
    return [
        ImageRecord(f"{defect}/{index:03}.png", defect, label, score, int(score > threshold), overlay)
        for label, defect, scores in ((0, "good", good), (1, "hole", bad))
        for index, score in enumerate(scores)
    ]


def category(records: list[ImageRecord], normal: list[float] | None = None, **options: Any) -> CategoryReport:
    defaults = {"threshold": 0.5, "run": Path("runs/parts")}
    if normal is not None:
        defaults["normal"] = NormalScores("leave-one-out", normal, normal)
    return CategoryReport("parts", NOTHING, {}, images=records, **{**defaults, **options})


def sample(seed: int = 0, **options: Any) -> CategoryReport:
    generator = np.random.default_rng(seed)
    good, bad = generator.normal(0.35, 0.1, 40).tolist(), generator.normal(0.6, 0.12, 30).tolist()
    return category(images(good, bad, 0.5), generator.normal(0.33, 0.09, 80).tolist(), **options)


def write(folder: Path, *categories: CategoryReport) -> str:
    path = folder / "report.html"
    write_report(path, title="Test", categories=categories, mean=NOTHING, config={}, environment={})
    return path.read_text(encoding="utf-8")


def data_of(page: str) -> dict[str, Any]:
    return json.loads(re.findall(r'<script type="application/json">(.*?)</script>', page, re.DOTALL)[0])


def test_the_data_hold_every_score_exactly(tmp_path):
    made = sample()
    data = data_of(write(tmp_path, made))
    ordered = sorted(made.images, key=lambda image: -image.score)
    assert data["name"] == [image.name for image in ordered]
    assert data["score"] == [image.score for image in ordered]
    assert data["label"] == [image.label for image in ordered]
    assert data["truth"] == [image.defect for image in ordered]
    assert data["link"] == [None] * 70
    assert data["normal"] == sorted(made.normal.scores)
    assert (data["threshold"], data["run"]) == (0.5, "runs/parts")


@pytest.mark.parametrize("scores", [[0.0], [1e-9, 1.0, 1e6], [-3.0, 2.0], [5.0, 5.0], [0.1, 0.2, 0.3]])
def test_each_strip_holds_each_of_its_images(tmp_path, scores):
    made = explorer(category(images(scores, scores[::-1], 0.5), [*scores, *scores], threshold=scores[0]), tmp_path)
    assert [(strip.name, strip.style) for strip in made.strips] == [
        ("normal images, leave-one-out", "validation"),
        ("good", "good"),
        ("defective", "bad"),
    ]
    for strip in made.strips:
        assert sum(height * strip.highest / 100 for _, height in strip.bars) == pytest.approx(strip.count)
        assert all(0 <= left <= 100 - 100 / BINS and 0 < height <= 100 for left, height in strip.bars)
    assert all(0 <= at <= 100 for at, _ in made.ticks)


def test_without_images_or_normal_scores(tmp_path):
    assert explorer(category([]), tmp_path) is None
    assert 'class="explorer"' not in write(tmp_path, category([]))
    page = write(tmp_path, category(images([0.1], [], 0.5)))
    assert data_of(page)["normal"] == []
    assert 'class="commands"' not in page
    assert 'data-count="normal"' not in page


@pytest.mark.parametrize(
    ("folder", "shown"), [("runs/a b", "'runs/a b'"), ("$(rm -r x)'", "'$(rm -r x)'\"'\"''"), ("-r", "./-r")]
)
def test_a_folder_is_one_argument_of_the_command(tmp_path, folder, shown):
    data = data_of(write(tmp_path, sample(run=Path(folder))))
    assert data["run"] == shown
    assert [Path(part) for part in shlex.split(shown)] == [Path(folder)]


def test_the_policy_names_the_script_and_allows_no_other(tmp_path):
    page = write(tmp_path, sample())
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)[1]
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none';")
    assert not re.search("http|unsafe-eval|[*]", policy)


def test_scores_must_be_finite():
    with pytest.raises(BKDError, match=r"score of good/000\.png of parts is inf"):
        category(images([math.inf], [], 0.5))
    with pytest.raises(BKDError, match="normal score of parts is nan"):
        category([], [math.nan])


def test_a_report_needs_labels(tmp_path):
    with pytest.raises(BKDError, match="images of parts have no label"):
        write(tmp_path, category([replace(image, label=None) for image in images([0.1], [0.9], 0.5)]))


def predictions(folder: Path, records: list[ImageRecord], **options: Any) -> str:
    path = folder / "report.html"
    write_predictions(path, title="Predictions", images=records, threshold=0.5, **options)
    return path.read_text(encoding="utf-8")


def test_predictions_come_by_falling_score_without_ground_truth(tmp_path):
    page = predictions(tmp_path, images([0.2, 0.7], [0.9, 0.4], 0.5), run=Path("runs/parts"))
    data = data_of(page)
    assert data["score"] == [0.9, 0.7, 0.4, 0.2]
    assert data["label"] == [None] * 4
    assert "4 images, 2 anomalous: score above 0.5." in page
    assert re.findall(r'<b class="name">(.*?)</b>', page)[:2] == ["hole/000.png", "good/001.png"]
    assert not re.search(
        'data-label|"right|"wrong|False alarms|Ground truth', page.split("<script>")[0].split("</style>")[1]
    )


@pytest.mark.parametrize("name", EVIL)
def test_a_hostile_name_stays_in_the_data(tmp_path, name):
    page = write(tmp_path, category([ImageRecord(name, name, 1, 1.0, 1)], run=Path(name)))
    assert data_of(page)["truth"] == [name]
    for text in (page, predictions(tmp_path, [ImageRecord(name, "", None, 1.0, 1)])):
        assert data_of(text)["name"] == [name]
        assert len(re.findall("<script", text)) == len(re.findall("</script>", text)) == 2
        script = re.search(r'<script type="application/json">(.*?)</script>', text, re.DOTALL)[1]
        assert not set("<>&'\u2028\u2029") & set(script)


def browse(folder: Path, page: str, steps: str, *, allowed: bool = True) -> Any:
    """Run JavaScript on the page in a browser; return what it passes to ``report(value)``, or None."""
    if BROWSER is None:
        pytest.skip("no Chromium or Chrome on this machine")
    script = f"""
    const report = (value) => {{
      const out = document.createElement("pre");
      out.id = "reported";
      out.textContent = JSON.stringify(value);
      document.body.append(out);
    }};
    const $ = (selector) => document.querySelector(selector);
    const press = (key, target) => (target ?? document.body).dispatchEvent(
      new KeyboardEvent("keydown", {{ key, bubbles: true, cancelable: true }}));
    const set = (value) => {{
      $(".exact").value = value;
      $(".exact").dispatchEvent(new Event("input", {{ bubbles: true }}));
    }};
    const counts = () => [...document.querySelectorAll(".counts td")].map((cell) => cell.textContent);
    {steps}
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    if allowed:
        page = page.replace("script-src ", f"script-src 'sha256-{digest}' ", 1)
    path = folder / "browsed.html"
    path.write_text(page.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    done = subprocess.run(
        [BROWSER, *options, f"--user-data-dir={folder / 'profile'}", "--window-size=1280,1600"]
        + ["--virtual-time-budget=3000", "--dump-dom", path.as_uri()],
        capture_output=True,
        timeout=120,
        check=True,
    )
    text = done.stdout.decode()
    found = re.search(r'<pre id="reported">(.*?)</pre>', text, re.DOTALL)
    return None if found is None else json.loads(html.unescape(found[1]))


def expected(made: CategoryReport, threshold: float) -> list[tuple[int, int]]:
    """Return (wrong, all) of the good, the defective and the normal images."""
    good, bad = ([image.score for image in made.images if image.label == label] for label in (0, 1))
    above = [(sum(score > threshold for score in scores), len(scores)) for scores in (good, bad, made.normal.scores)]
    return [above[0], (len(bad) - above[1][0], len(bad)), above[2]]


def read(cells: list[str]) -> list[tuple[int, int]]:
    """Return (wrong, all) of each row of counts; its rate must say the same."""
    pairs = [tuple(map(int, cell.split(" of "))) for cell in cells[::2]]
    for (wrong, whole), rate in zip(pairs, cells[1::2], strict=True):
        assert float(rate.removesuffix(" %")) == pytest.approx(100 * wrong / whole, abs=0.051)
    return pairs


def test_counts_follow_the_threshold(tmp_path):
    made = sample()
    scores = [image.score for image in made.images]
    thresholds = [-1.0, *scores[::7], *made.normal.scores[::9], 0.5, 99.0]
    got = browse(
        tmp_path,
        write(tmp_path, made),
        f"const shown = [counts()]; for (const value of {thresholds}) {{ set(value); shown.push(counts()); }}"
        '$(".reset").click(); shown.push(counts(), $(".exact").valueAsNumber, $(".explorer").hidden); report(shown);',
    )
    assert got[-2:] == [0.5, False]
    assert [read(cells) for cells in got[:-2]] == [expected(made, threshold) for threshold in [0.5, *thresholds, 0.5]]


@pytest.mark.parametrize("count", [1, 9, 60, 99, 313])
def test_the_command_sets_the_threshold(tmp_path, count):
    normal = sorted(np.random.default_rng(count).uniform(0.1, 0.9, count).tolist())
    got = browse(
        tmp_path,
        write(tmp_path, category(images([0.1], [0.9], 0.5), normal)),
        'const lines = () => [...document.querySelectorAll(".commands code")].map((code) => code.textContent);'
        f"const shown = []; for (const value of {normal}) {{ set(value); shown.push(lines()); }}"
        f'set({normal[0] - 0.05}); shown.push($(".commands").hidden, $(".sets").textContent); report(shown);',
    )
    assert got[-2] is True
    assert "no rate" in got[-1]
    for value, (plain, renewed) in zip(normal, got[:-2], strict=True):
        command, rate = plain.rsplit(" ", 1)
        assert command == "bkd-fast calibrate runs/parts --false-alarms"
        assert renewed == f"bkd-fast calibrate runs/parts good/ --false-alarms {rate}"
        assert threshold_for(normal, float(rate)).value == value


def test_pictures_and_rows_change_their_outcome(tmp_path):
    overlay = tmp_path / "overlays" / "one.png"
    write_overlay(overlay, np.zeros((60, 90, 3), np.uint8))
    made = category(images([0.2, 0.6], [0.4, 0.8], 0.5, overlay), [0.1, 0.5])
    seen = """
    const seen = () => ({
      rows: [...document.querySelectorAll(".list tbody tr")].map((row) =>
        [row.firstChild.textContent, row.dataset.outcome, row.lastChild.textContent]),
      groups: [...document.querySelectorAll(".group")].map((group) =>
        [...group.querySelectorAll("h4, .name")].map((text) => text.textContent)),
      words: [...document.querySelectorAll(".groups .card")].map((card) =>
        [card.querySelector(".compared").textContent, card.querySelector(".predicted-is").className.split(" ")[1]]),
    });
    """
    got = browse(
        tmp_path,
        write(tmp_path, made),
        f'{seen} $(".next").click(); const shown = [seen()]; set(0.7); shown.push(seen()); set(0); shown.push(seen());'
        "report(shown);",
    )
    assert [row[1] for row in got[0]["rows"]] == ["found", "alarm", "missed", "good"]
    assert got[0]["groups"] == [
        ["Missed defects 1 of 1", "hole/000.png"],
        ["False alarms 1 of 1", "good/001.png"],
        ["Found defects 1 of 1", "hole/001.png"],
        ["Good images 1 of 1", "good/000.png"],
    ]
    assert got[1]["rows"] == [
        ["hole/001.png", "found", "found"],
        ["good/001.png", "good", "good"],
        ["hole/000.png", "missed", "missed"],
        ["good/000.png", "good", "good"],
    ]
    assert got[1]["words"] == [["≤ 0.7", "wrong"], ["> 0.7", "right"], ["≤ 0.7", "right"], ["≤ 0.7", "right"]]
    assert [group[0] for group in got[2]["groups"]] == ["False alarms 2 of 2", "Found defects 2 of 2"]


def test_keys_go_through_the_images_and_pointers_move_the_line(tmp_path):
    overlay = tmp_path / "overlays" / "one.png"
    write_overlay(overlay, np.zeros((60, 90, 3), np.uint8))
    made = category(images([0.2, 0.6], [0.4, 0.8], 0.5, overlay), [0.1, 0.5])
    got = browse(
        tmp_path,
        write(tmp_path, made),
        """
        const now = () => $(".list [aria-current]")?.firstChild.textContent ?? null;
        const shown = [now()];
        for (const key of ["j", "ArrowRight", "j", "j", "j", "k", "ArrowLeft"]) { press(key); shown.push(now()); }
        press("ArrowRight", $(".slider")); press("j", $(".exact")); shown.push(now());
        $(".filter").value = "good"; $(".filter").dispatchEvent(new Event("change")); press("j"); shown.push(now());
        shown.push($(".viewer img").src.slice(0, 22), $(".viewer a").getAttribute("href"));
        const plot = $(".plot").getBoundingClientRect();
        const at = { clientX: plot.left + plot.width / 4, clientY: plot.top + 5, pointerId: 1, bubbles: true };
        $(".plot").setPointerCapture = () => {};
        $(".plot").dispatchEvent(new PointerEvent("pointerdown", at));
        shown.push($(".exact").valueAsNumber, $(".slider").value, document.activeElement.className);
        $(".slider").value = 750; $(".slider").dispatchEvent(new Event("input"));
        shown.push($(".exact").valueAsNumber, $(".slider").getAttribute("aria-valuetext"));
        report(shown);
        """,
    )
    names = ["hole/001.png", "good/001.png", "hole/000.png", "good/000.png"]
    assert got[:8] == [None, *names, names[3], names[2], names[1]]
    assert got[8:10] == [names[1], names[3]]
    assert got[10] == "data:image/jpeg;base64"
    assert got[11] == "overlays/one.png"
    axis = data_of(write(tmp_path, made))["axis"]
    value = [axis["low"] + share * (axis["high"] - axis["low"]) for share in (0.25, 0.75)]
    assert got[12:15] == [pytest.approx(value[0], abs=1e-3), "250", "slider"]
    assert got[15:] == [pytest.approx(value[1], abs=1e-3), f"{got[15]:.4g}: false alarms 0, misses 1"]


def test_predictions_follow_the_threshold(tmp_path):
    records = images([0.2, 0.7], [0.9, 0.4], 0.5)
    normal = NormalScores("validation", [0.1, 0.3, 0.5], [0.1])
    got = browse(
        tmp_path,
        predictions(tmp_path, records, run=Path("runs/parts"), normal=normal),
        """
        const shown = [counts()]; set(0.3); shown.push(counts()); press("j");
        $(".filter").value = "normal"; $(".filter").dispatchEvent(new Event("change"));
        shown.push([...document.querySelectorAll(".list tbody tr:not([hidden])")].map((row) => row.textContent));
        shown.push([...document.querySelectorAll(".group h4")].map((heading) => heading.textContent));
        report(shown);
        """,
    )
    assert got[0] == ["2 of 4", "50.0 %", "0 of 3", "0.0 %"]
    assert got[1] == ["3 of 4", "75.0 %", "1 of 3", "33.3 %"]
    assert got[2:] == [["good/000.png0.2normal"], ["Anomalous images 3 of 3", "Normal images 1 of 1"]]


def test_an_overlay_without_a_thumbnail_is_read_from_the_folder(tmp_path):
    scores = np.linspace(0.1, 0.4, 60).tolist()
    for image in (records := images(scores, [], 0.5)):
        write_overlay(tmp_path / image.name, np.zeros((6, 9, 3), np.uint8))
    made = category([replace(image, overlay=tmp_path / image.name) for image in records], [0.5])
    page = write(tmp_path, made)
    (tmp_path / records[57].name).unlink()
    got = browse(
        tmp_path,
        page,
        """
        const image = $(".viewer img"), shown = [];
        const next = () => { press("j"); if (image.src.startsWith("data:")) next(); };
        image.addEventListener("load", () => {
          if (image.src.startsWith("data:")) return;
          shown.push(decodeURI(image.src).split("/").pop(), image.naturalWidth, $(".viewer a").hidden);
          next();
        });
        image.addEventListener("error", () => setTimeout(() => {
          shown.push($(".viewer .empty").textContent, $(".viewer a").hidden);
          report(shown);
        }));
        next();
        """,
    )
    assert got == ["058.png", 9, False, "The picture is not beside this page.", True]


def test_without_a_browser_that_runs_scripts_nothing_is_different(tmp_path):
    page = write(tmp_path, sample())
    assert page.count('<div class="explorer" hidden>') == 1
    page = re.sub(r'<div class="explorer" hidden>.*?</script>\s*</div>', "", page, flags=re.DOTALL)
    for kept in ("Image scores", "Missed defects", "Good images", "predicted <b", "threshold 0.5"):
        assert kept in page


def test_hostile_names_are_text_in_the_browser(tmp_path):
    made = category([ImageRecord(name, name, 1, 1.0, 1) for name in EVIL], [0.5], run=Path(EVIL[0]))
    got = browse(
        tmp_path,
        write(tmp_path, made),
        """press("j"); report([document.title, [...document.querySelectorAll(".list tbody th")].map((cell) =>
        cell.textContent), document.querySelectorAll("img:not(.viewer img)").length]);""",
    )
    assert got == ["Test", EVIL, 0]


def test_the_policy_stops_other_scripts(tmp_path):
    page = write(tmp_path, sample())
    assert browse(tmp_path, page, "report(1);") == 1
    assert browse(tmp_path, page, "report(1);", allowed=False) is None
