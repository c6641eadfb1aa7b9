"""A picture of the inside of a model: distances of each branch and level, offsets, aligned support, memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from bkd_fast.evaluation.report.overlays import GAP, GROUND, LEGEND, TEXT
from bkd_fast.inference.explain import Explanation, View
from bkd_fast.inference.heat import COLOURS, HeatScale

SIDE = 180  # longer side of a tile, in pixels
CAPTION = 34
ARROWS = 12  # along the longer side of a tile
ARROW = (255, 214, 64)
DISTANCES = HeatScale(1 / 6, 6, unit="times normal")
Tile = tuple[Image.Image, str]


def render_inside(image: np.ndarray, explanation: Explanation) -> np.ndarray:
    """Return a picture with a row of tiles for each part of the model.

    The rows: the image, and the distances of each branch and level; the offsets as arrows, and the distance to the
    support before and after alignment; the memory item with the largest weight (a colour for each item), and the number
    of items that each feature is read from.

    Args:
        image: (H, W, 3) uint8, any size.

    Returns:
        (rows, columns, 3) uint8, with the legend in the last rows, as in
        :func:`bkd_fast.evaluation.report.render_panel`.
    """
    factor = SIDE / max(image.shape[:2])
    size = (max(1, round(image.shape[1] * factor)), max(1, round(image.shape[0] * factor)))
    picture = Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)
    rows = [[(picture, "image"), *_distances(explanation, size)]]
    if explanation.offsets or explanation.unaligned:
        rows.append([*_offsets(explanation, picture), *_alignment(explanation, size)])
    if explanation.kept:
        rows.append(_memory(explanation, size))
    return _page(rows, size)


def _distances(explanation: Explanation, size: tuple[int, int]) -> list[Tile]:
    return [
        (_stretched(DISTANCES.colours(level), size), f"{branch}, {_name(view)}\nup to {level.max():.1f} times normal")
        for branch, levels in explanation.distances.items()
        for view, level in levels.items()
    ]


def _offsets(explanation: Explanation, picture: Image.Image) -> list[Tile]:
    tiles = []
    height, width = next(level.shape for levels in explanation.distances.values() for level in levels.values())
    across, along = picture.width / width, picture.height / height  # tile : network's image
    for view, offset in explanation.offsets.items():
        tile = Image.blend(picture.convert("L").convert("RGB"), Image.new("RGB", picture.size), 0.35)
        draw = ImageDraw.Draw(tile)
        rows, columns = offset.shape[1:]
        step = -(-max(rows, columns) // ARROWS)
        for row in range(step // 2, rows, step):
            for column in range(step // 2, columns, step):
                down, right = offset[:, row, column]
                start = ((column + 0.5) * picture.width / columns, (row + 0.5) * picture.height / rows)
                draw.line([start, (start[0] + right * across, start[1] + down * along)], fill=ARROW)
                draw.rectangle([start[0] - 1, start[1] - 1, start[0] + 1, start[1] + 1], fill=ARROW)
        length = np.hypot(*offset)
        tiles.append((tile, f"offsets, {_name(view)}\nmean {length.mean():.1f}, up to {length.max():.1f} pixels"))
    return tiles


def _alignment(explanation: Explanation, size: tuple[int, int]) -> list[Tile]:
    tiles = []
    for view, before in explanation.unaligned.items():
        after = explanation.aligned[view]
        top = max(float(before.max()), float(after.max()), 1e-6)
        scale = HeatScale(0, top, log=False)
        tiles += [
            (_stretched(scale.colours(before), size), f"support, {_name(view)}\nmean distance {before.mean():.3f}"),
            (_stretched(scale.colours(after), size), f"aligned, {_name(view)}\nmean distance {after.mean():.3f}"),
        ]
    return tiles


def _memory(explanation: Explanation, size: tuple[int, int]) -> list[Tile]:
    tiles = []
    for view, kept in explanation.kept.items():
        item, weight = explanation.strongest[view], explanation.weight[view]
        used = len(np.unique(item[item >= 0]))
        tiles += [
            (
                _stretched(_colour_of(item), size, Image.Resampling.NEAREST),
                f"memory, {_name(view)}\n{used} items first, weight {np.median(weight):.2f}",
            ),
            (
                _stretched(HeatScale(0, max(float(kept.max()), 1), log=False).colours(kept), size),
                f"items read, {_name(view)}\nmedian {np.median(kept):.0f}, up to {kept.max()}",
            ),
        ]
    return tiles


def _name(view: View) -> str:
    return f"stride {view}" if isinstance(view, int) else view


def _colour_of(item: np.ndarray) -> np.ndarray:
    """Return the colour of each item, (h, w, 3) uint8, the same in every picture; black for no item (-1)."""
    mixed = (item.astype(np.uint64) + 1) * np.uint64(2_654_435_761)  # Knuth's multiplicative hash
    channels = [(mixed >> np.uint64(shift)).astype(np.uint8) // 2 + 96 for shift in (6, 13, 20)]
    return np.where((item >= 0)[..., None], np.stack(channels, -1), 0).astype(np.uint8)


def _stretched(
    colours: np.ndarray, size: tuple[int, int], how: Image.Resampling = Image.Resampling.BILINEAR
) -> Image.Image:
    return Image.fromarray(colours).resize(size, how)


def _page(rows: Sequence[Sequence[Tile]], size: tuple[int, int]) -> np.ndarray:
    font = ImageFont.load_default(size=12)
    longest = max(font.getlength(line) for row in rows for _, text in row for line in text.split("\n"))
    width, height = max(size[0], round(longest) + 6) + GAP, size[1] + CAPTION
    columns = max(len(row) for row in rows)
    page = Image.new("RGB", (columns * width, len(rows) * height + LEGEND), GROUND)
    draw = ImageDraw.Draw(page)
    for top, row in enumerate(rows):
        for left, (tile, text) in enumerate(row):
            page.paste(tile, (left * width, top * height))
            draw.multiline_text((left * width + 2, top * height + size[1] + 2), text, fill=TEXT, font=font, spacing=2)
    bar = Image.fromarray(COLOURS[None, ::2].repeat(10, axis=0))
    line = len(rows) * height + LEGEND // 2
    draw.text((8, line), f"distances {DISTANCES.low:.2g}", fill=TEXT, font=font, anchor="lm")
    page.paste(bar, (110, line - 5))
    draw.text((118 + bar.width, line), f"{DISTANCES.high:.2g} times normal", fill=TEXT, font=font, anchor="lm")
    return np.asarray(page).copy()
