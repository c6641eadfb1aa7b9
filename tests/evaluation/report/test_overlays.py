"""Panels: one colour per value whatever the image, outlines where the masks are, files that are whole."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from bkd_fast.errors import BKDError
from bkd_fast.evaluation.report import HeatScale, render_panel, write_overlay
from bkd_fast.evaluation.report.overlays import GAP, LEGEND, PREDICTED, TRUTH, thumbnail
from bkd_fast.inference.heat import COLOURS

SCALE = HeatScale(1e-3, 1.0)
GREY = np.full((50, 60, 3), 128, np.uint8)


def tiles(panel: np.ndarray) -> list[np.ndarray]:
    width = (panel.shape[1] - 2 * GAP) // 3
    return [panel[:-LEGEND, start : start + width] for start in range(0, panel.shape[1] - width + 1, width + GAP)]


def test_colours_grow_lighter_in_even_steps():
    linear = np.where(COLOURS <= 10, COLOURS / 255 / 12.92, ((COLOURS / 255 + 0.055) / 1.055) ** 2.4)
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    lightness = np.where(luminance > 0.008856, 116 * np.cbrt(luminance) - 16, 903.3 * luminance)
    assert (np.diff(lightness[::8]) > 0).all()
    np.testing.assert_allclose(lightness, np.linspace(5, 96, 256), atol=4)


def test_the_scale_is_logarithmic_clipped_and_fixed():
    np.testing.assert_allclose(SCALE.position(np.array([-1, 0, 1e-3, 10**-1.5, 1, 7])), [0, 0, 0, 0.5, 1, 1], atol=1e-6)
    np.testing.assert_allclose(HeatScale(0, 4, log=False).position(np.array([[1.0, 3.0]])), [[0.25, 0.75]])
    assert SCALE.colours(np.ones((2, 3))).tolist() == [[COLOURS[-1].tolist()] * 3] * 2


@pytest.mark.parametrize(
    ("low", "high", "log", "message"),
    [
        (1, 1, False, "low first"),
        (2, 1, True, "low first"),
        (0, np.inf, False, "finite"),
        (np.nan, 1, True, "finite"),
        (0, 1, True, "logarithmic heat scale from 0"),
    ],
)
def test_unusable_scales_are_refused(low, high, log, message):
    with pytest.raises(BKDError, match=message):
        HeatScale(low, high, log)


def test_the_same_value_has_the_same_colour_whatever_else_an_image_holds():
    quiet, loud = np.full((50, 60), 0.03, np.float32), np.full((50, 60), 0.03, np.float32)
    loud[30:, 30:] = 0.9
    one, other = (tiles(render_panel(GREY, heat, None, None, SCALE))[1] for heat in (quiet, loud))
    np.testing.assert_array_equal(one[:100, :100], other[:100, :100])
    assert (other[-50:, -50:].mean((0, 1)) > one[-50:, -50:].mean((0, 1))).all()


def test_outlines_are_drawn_where_the_masks_are_and_only_there():
    predicted, true = np.zeros((50, 60), bool), np.zeros((50, 60), bool)
    predicted[10:20, 10:20] = True
    true[30:40, 30:50] = True
    panel = render_panel(GREY, np.zeros((50, 60), np.float32), predicted, true, SCALE, side=240)
    image, _, outlined = tiles(panel)
    red, cyan = (outlined == PREDICTED).all(-1), (outlined == TRUTH).all(-1)
    expected = np.zeros((200, 240), bool)
    expected[40:80, 40:80] = True
    expected[42:78, 42:78] = False
    np.testing.assert_array_equal(red, expected)
    expected[:] = False
    expected[118:162, 118:202] = True
    expected[120:160, 120:200] = False
    np.testing.assert_array_equal(cyan, expected)
    np.testing.assert_array_equal(outlined[~red & ~cyan], 128)
    np.testing.assert_array_equal(image, 128)


def test_without_masks_nothing_is_drawn_and_a_full_mask_shows_at_the_border():
    heat = np.zeros((50, 60), np.float32)
    bare = tiles(render_panel(GREY, heat, None, None, SCALE))[2]
    np.testing.assert_array_equal(bare, 128)
    full = tiles(render_panel(GREY, heat, None, np.ones((50, 60), bool), SCALE))[2]
    assert (full[0] == TRUTH).all()
    assert (full[10:-10, 10:-10] == 128).all()


def test_equal_masks_show_both_outlines():
    mask = np.zeros((50, 60), bool)
    mask[20:30, 20:30] = True
    outlined = tiles(render_panel(GREY, np.zeros((50, 60), np.float32), mask, mask, SCALE))[2]
    assert (outlined == PREDICTED).all(-1).any()
    assert (outlined == TRUTH).all(-1).any()


@pytest.mark.parametrize("size", [(1, 1), (7, 300), (300, 7), (64, 64), (500, 900)])
def test_any_image_size_with_a_map_and_mask_of_another(size):
    panel = render_panel(
        np.zeros((*size, 3), np.uint8), np.ones((16, 16), np.float32), np.ones((8, 8), bool), None, SCALE, side=100
    )
    assert panel.dtype == np.uint8
    assert panel.shape[0] == max(1, round(100 * size[0] / max(size))) + LEGEND
    assert panel.shape[1] >= 3 * max(1, round(100 * size[1] / max(size))) + 2 * GAP


@pytest.mark.parametrize(
    ("image", "heat", "mask", "message"),
    [
        (np.zeros((4, 4), np.uint8), np.zeros((4, 4)), None, r"expected an image \(H, W, 3\)"),
        (np.zeros((4, 4, 3)), np.zeros((4, 4)), None, "not .* of float64"),
        (GREY, np.zeros((1, 4, 4)), None, "expected an anomaly map"),
        (GREY, np.zeros((4, 4), int), None, "expected an anomaly map"),
        (GREY, np.zeros((4, 4)), np.zeros((4, 4), np.uint8), "mask: expected"),
    ],
)
def test_wrong_arrays_are_refused(image, heat, mask, message):
    with pytest.raises(BKDError, match=message):
        render_panel(image, heat, mask, None, SCALE)


def test_a_written_overlay_is_the_panel_and_its_thumbnail_has_no_legend(tmp_path):
    panel = render_panel(GREY, np.full((50, 60), 0.1, np.float32), None, None, SCALE)
    path = tmp_path / "overlays" / "good" / "000.png"
    write_overlay(path, panel)
    np.testing.assert_array_equal(np.asarray(Image.open(path)), panel)
    assert [file.name for file in path.parent.iterdir()] == ["000.png"]
    small = Image.open(io.BytesIO(thumbnail(path, 290)))
    assert (small.format, small.width) == ("JPEG", 290)
    assert small.height == pytest.approx(290 * (panel.shape[0] - LEGEND) / panel.shape[1], abs=1)


def test_the_legend_says_score_and_decision_and_marks_the_threshold():
    heat, marked = np.full((50, 60), 0.1, np.float32), HeatScale(1e-2, 1.0, threshold=0.1)
    plain = render_panel(GREY, heat, None, None, HeatScale(1e-2, 1.0))[-LEGEND:]
    legend = render_panel(GREY, heat, None, None, marked)[-LEGEND:]
    columns = np.flatnonzero((legend == 255).all(-1).sum(0) == 16)
    changed = np.flatnonzero((legend != plain).any((0, 2)))
    bar = np.flatnonzero((plain[LEGEND // 2] == COLOURS[0]).all(-1))[0]
    np.testing.assert_array_equal(columns, bar + round(0.5 * 127) + np.arange(2))
    assert set(changed) <= set(range(columns[0] - 1, columns[1] + 2))
    outside = render_panel(GREY, heat, None, None, HeatScale(1e-2, 1.0, threshold=2.0))[-LEGEND:]
    np.testing.assert_array_equal(outside, plain)
    shown = {
        score: render_panel(GREY, heat, None, None, marked, score=score, threshold=1.0)[-LEGEND:]
        for score in (0.5, 1.0, 1.5)
    }
    assert {score: bool((part == PREDICTED).all(-1).any()) for score, part in shown.items()} == {
        0.5: False,
        1.0: False,  # at the threshold is normal
        1.5: True,
    }
    assert (shown[0.5] != shown[1.0]).any()


def test_a_narrow_image_has_room_for_its_legend():
    heat, mask = np.full((900, 60), 0.1, np.float32), np.zeros((900, 60), bool)
    panel = render_panel(np.zeros((900, 60, 3), np.uint8), heat, mask, mask, SCALE, score=-1234.5, threshold=0.0001234)
    assert panel.shape[1] > 400
    assert (panel[-LEGEND:, -8:] == panel[-1, -1]).all()  # nothing is cut
