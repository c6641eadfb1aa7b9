"""The picture of the kernels: every mean is a number in it, nothing overlaps, and it has colours for dark pages."""

import itertools
import xml.dom.minidom
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="the extra bench is not installed")
import all as figures
import plot

from bkd_fast.benchmark.results import Group, read, relative

ROOT = Path(__file__).parents[2]
FILES = [path for name in figures.DRAWN if (path := ROOT / figures.RESULTS / name).exists()]


def texts(figure):
    """Every text with its box in pixels."""
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    return [(text.get_text(), text.get_window_extent(renderer)) for text in figure.axes[0].texts]


def test_no_text_of_the_committed_results_lies_on_another_or_on_a_bar():
    figure = plot.draw(relative([row for path in FILES for row in read(path)]))
    found = texts(figure)
    for (one, box), (other, second) in itertools.combinations(found, 2):
        assert not box.overlaps(second), (one, other)
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.width for _, box in found)
    for bar in figure.axes[0].patches:
        box = bar.get_window_extent()
        assert not any(box.overlaps(other) for _, other in found)
    plot.pyplot.close(figure)


def test_means_are_numbers_with_bars_that_point_to_the_faster_side(tmp_path):
    means = {
        Group("conv", "WRN50 N=1", "forward", "bkd_fast native"): 1.0,
        Group("conv", "WRN50 N=1", "forward", "torchvision"): 3.456,
        Group("conv", "WRN50 N=1", "forward", "onnxruntime"): 0.5,
        Group("conv", "WRN50 N=1", "forward", "openvino"): 1e6,
        Group("conv", "WRN50 N=1 NCHW", "forward", "torchvision"): 9.0,
    }
    figure = plot.draw(means)
    shown = [text for text, _ in texts(figure)]
    assert {"conv, forward", "WRN50 N=1", "torchvision", "3.46", "0.50", "1000000"} <= set(shown)
    assert "9.00" not in shown
    _, _, slower, faster, slowest = figure.axes[0].patches
    assert slower.get_width() > 0 > faster.get_width()
    assert slowest.get_width() < plot.COLUMN
    plot.save(figure, tmp_path / "kernels.svg")
    svg = (tmp_path / "kernels.svg").read_text()
    xml.dom.minidom.parseString(svg)
    assert "prefers-color-scheme: dark" in svg
    assert all(f": {colour}" in svg for colour in (plot.INK, plot.PAPER, plot.SLOWER, plot.FASTER))


def test_files_without_peers_are_an_error():
    with pytest.raises(SystemExit, match="none of the files has a provider that is drawn"):
        plot.draw({Group("conv", "WRN50 N=1", "forward", "bkd_fast native"): 1.0})


def test_published_results_are_of_a_commit(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(figures, "provenance", lambda: {"commit": "abc-dirty"})
    monkeypatch.setattr(figures, "execute", lambda _: pytest.fail("was measured"))
    with pytest.raises(SystemExit, match="has changes since abc: commit or stash"):
        figures.main([])
    with pytest.raises(SystemExit):
        figures.main(["--quick"])
    assert "--quick needs --out DIR" in capsys.readouterr().err


@pytest.mark.slow
def test_all_tables_and_the_picture_are_made(tmp_path):
    figures.main(["--quick", "--out", str(tmp_path)])
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {figures.PICTURE, *(f"{figures.RESULTS}/{name}" for name in figures.COMMANDS)}
    for path in tmp_path.rglob("*.csv"):
        assert {"commit", "date", "machine", "threads", "torch", "triton"} <= set(
            path.read_text().split("\n")[0].split(",")
        )
