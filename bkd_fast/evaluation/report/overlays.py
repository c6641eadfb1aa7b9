"""One picture per image: the image, its heat map on the run's scale, the outlines of prediction and ground truth."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from bkd_fast.errors import BKDError
from bkd_fast.files import atomic_path
from bkd_fast.inference.heat import COLOURS, HeatScale

PREDICTED, TRUTH = (255, 64, 64), (0, 230, 255)
SIDE = 384
LEGEND = 24  # rows of the legend below the tiles
GAP = 4
HEAT_SHARE = 0.62  # constant, so that the tint depends on the value alone
GROUND, TEXT = (24, 26, 32), (222, 226, 234)


def render_panel(
    image: np.ndarray,
    anomaly_map: np.ndarray,
    mask: np.ndarray | None,
    truth: np.ndarray | None,
    scale: HeatScale,
    *,
    score: float | None = None,
    threshold: float | None = None,
    side: int = SIDE,
) -> np.ndarray:
    """Return a picture: image | heat map over the grey image | image with outlines, and a legend below.

    Args:
        image: (H, W, 3) uint8, any size.
        anomaly_map: (h, w) float, resized to the image.
        mask: (h', w') bool, predicted defects; the inner edge is drawn red. None: not drawn.
        truth: the same for the ground truth; the outer edge is drawn cyan.
        scale: the run's colour scale.
        score, threshold: of the image; the legend then says both and the decision.
        side: longer side of each of the three tiles, in pixels.

    Returns:
        The panel (rows, columns, 3) uint8.

    Raises:
        BKDError: an array has another shape or dtype.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise BKDError(f"expected an image (H, W, 3) of uint8, not {image.shape} of {image.dtype}")
    if anomaly_map.ndim != 2 or not np.issubdtype(anomaly_map.dtype, np.floating):
        raise BKDError(f"expected an anomaly map (h, w) of floats, not {anomaly_map.shape} of {anomaly_map.dtype}")
    height, width = image.shape[:2]
    factor = side / max(height, width)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    picture = Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)
    tile = np.asarray(picture)
    stretched = np.asarray(Image.fromarray(anomaly_map.astype(np.float32)).resize(size, Image.Resampling.BILINEAR))
    grey = np.asarray(picture.convert("L"), np.float32)[..., None]
    heat = ((1 - HEAT_SHARE) * grey + HEAT_SHARE * scale.colours(stretched)).round().astype(np.uint8)
    outlined = tile.copy()
    if truth is not None:
        outlined[_outer_edge(_resized("truth", truth, size))] = TRUTH
    if mask is not None:
        outlined[_inner_edge(_resized("mask", mask, size))] = PREDICTED
    tiles = Image.new("RGB", (3 * size[0] + 2 * GAP, size[1]), GROUND)
    for index, part in enumerate((tile, heat, outlined)):
        tiles.paste(Image.fromarray(part), (index * (size[0] + GAP), 0))
    legend = _legend(scale, mask is not None, truth is not None, tiles.width, score, threshold)
    panel = Image.new("RGB", (legend.width, size[1] + LEGEND), GROUND)
    panel.paste(tiles, (0, 0))
    panel.paste(legend, (0, size[1]))
    return np.asarray(panel).copy()


def write_overlay(path: str | Path, panel: np.ndarray) -> None:
    """Write a panel (rows, columns, 3) uint8 atomically; create its folder.

    Args:
        path: PNG, or JPEG if it ends in ``.jpg``: a twentieth of the time and a third of the size.
    """
    jpeg = Path(path).suffix == ".jpg"
    with atomic_path(path, durable=False) as temporary:
        if jpeg:  # full chroma resolution: outlines are thin
            Image.fromarray(panel).save(temporary, format="JPEG", quality=90, subsampling=0)
        else:
            Image.fromarray(panel).save(temporary, format="PNG", compress_level=3)  # half the time of 6, 7 % larger


def thumbnail(path: str | Path, width: int) -> bytes:
    """Return a written panel without its legend as JPEG, at most ``width`` pixels wide.

    Raises:
        OSError: the file is missing or not an image.
    """
    with Image.open(path) as panel:
        tiles = panel.convert("RGB").crop((0, 0, panel.width, max(1, panel.height - LEGEND)))
    tiles.thumbnail((width, width), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    tiles.save(buffer, format="JPEG", quality=80, optimize=True)
    return buffer.getvalue()


def _resized(name: str, mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if mask.ndim != 2 or mask.dtype != np.bool_:
        raise BKDError(f"{name}: expected (h, w) of bool, not {mask.shape} of {mask.dtype}")
    return np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))


def _inner_edge(mask: np.ndarray) -> np.ndarray:
    return mask & ~ndimage.binary_erosion(mask, np.ones((3, 3)), iterations=2)


def _outer_edge(mask: np.ndarray) -> np.ndarray:
    """Return two pixels around the mask. At the image's border they are inside: a full mask has an edge too."""
    frame = np.ones_like(mask)
    frame[2:-2, 2:-2] = False
    return (ndimage.binary_dilation(mask, np.ones((3, 3)), iterations=2) & ~mask) | (mask & frame)


def _legend(
    scale: HeatScale, mask: bool, truth: bool, width: int, score: float | None, threshold: float | None
) -> Image.Image:
    """Return the legend, at least ``width`` pixels wide and as its text needs; without the unit if it is narrow.

    A wider legend would make the tiles of the panel's thumbnail small.
    """
    font = ImageFont.load_default(size=13)
    parts: list[tuple[str, tuple[int, int, int]] | Image.Image] = []
    if score is not None and threshold is not None:
        anomalous = score > threshold
        decision = f"{'ANOMALOUS' if anomalous else 'NORMAL'}  score {score:.4g}, threshold {threshold:.4g}"
        parts += [(decision, PREDICTED if anomalous else TEXT), Image.new("RGB", (8, 1), GROUND)]
    parts += [(f"heat {scale.low:.2g}", TEXT), _bar(scale), (f"{scale.high:.2g} {scale.unit}".strip(), TEXT)]
    for shown, name, colour in ((mask, "predicted", PREDICTED), (truth, "ground truth", TRUTH)):
        if shown:
            parts += [Image.new("RGB", (18, 3), colour), (name, TEXT)]
    x, positions = 8, []
    for part in parts:
        positions.append(x)
        x += (part.width if isinstance(part, Image.Image) else round(font.getlength(part[0]))) + 8
    if x > width and scale.unit:
        return _legend(replace(scale, unit=""), mask, truth, width, score, threshold)
    line = Image.new("RGB", (max(width, x), LEGEND), GROUND)
    draw = ImageDraw.Draw(line)
    for left, part in zip(positions, parts, strict=True):
        if isinstance(part, Image.Image):
            line.paste(part, (left, (LEGEND - part.height) // 2 + 1))
        else:
            draw.text((left, LEGEND // 2), part[0], fill=part[1], font=font, anchor="lm")
    return line


def _bar(scale: HeatScale) -> Image.Image:
    """Return the colours of the scale, with a white mark at its threshold."""
    bar = np.full((16, 128, 3), GROUND, np.uint8)
    bar[3:13] = COLOURS[::2]
    if scale.threshold is not None and scale.low < scale.threshold < scale.high:
        column = round(float(scale.position(np.array(scale.threshold))) * 127)
        bar[:, max(column - 1, 0) : column + 3] = GROUND
        bar[:, column : column + 2] = 255
    return Image.fromarray(bar)
