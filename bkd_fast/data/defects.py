"""Defects planted into texture images of the demo set, each with its exact mask."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

Defect = Callable[[np.ndarray, np.ndarray, np.random.Generator], tuple[np.ndarray, np.ndarray]]
OVERSAMPLE = 4  # shapes are drawn this much larger, so that their edges are smooth
VISIBLE = 0.3  # coverage from which a pixel belongs to the defect


def scratch(image: np.ndarray, _: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A bent bright or dark line, 6 to 9 pixels wide."""
    size = image.shape[0]
    length, angle = random.uniform(0.35, 0.65) * size, random.uniform(0, 2 * np.pi)
    start = random.uniform(0.25, 0.75, 2) * size - 0.5 * length * np.array([np.cos(angle), np.sin(angle)])
    points = [start]
    for _step in range(8):
        angle += random.normal(0, 0.15)
        points.append(points[-1] + length / 8 * np.array([np.cos(angle), np.sin(angle)]))
    width = random.uniform(6, 9)
    alpha = _drawn(size, lambda draw: draw.line(
        [tuple(OVERSAMPLE * point) for point in points], fill=255, width=round(OVERSAMPLE * width), joint="curve"
    ))  # fmt: skip
    tone = random.choice([-1, 1]) * random.uniform(60, 90)
    return image + alpha * np.clip(tone, 20 - image, 235 - image), alpha > VISIBLE


def hole(image: np.ndarray, _: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A dark pit with a soft edge, 16 to 36 pixels across."""
    alpha = _blob(image.shape[0], random.uniform(8, 18), 0.15, random)
    floor = 25 + 0.15 * image
    return image + ndimage.gaussian_filter(alpha, 1.0) * (floor - image), alpha > VISIBLE


def stain(image: np.ndarray, _: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A blot through which the texture is seen, blurred and with less contrast, 36 to 80 pixels across."""
    alpha = _blob(image.shape[0], random.uniform(18, 40), 0.25, random)
    smooth = ndimage.gaussian_filter(image, 3.0)
    covered = 0.3 * image + 0.7 * smooth + random.choice([-1, 1]) * random.uniform(24, 36)
    return image + ndimage.gaussian_filter(alpha, 1.5) * (covered - image), alpha > VISIBLE


def foreign(image: np.ndarray, other: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A patch of another texture with the brightness and contrast of the place it lies on."""
    alpha = _blob(image.shape[0], random.uniform(22, 40), 0.3, random)
    inside = alpha > 0.5
    patch = (other - other[inside].mean()) / max(other[inside].std(), 1.0)
    patch = image[inside].mean() + patch * image[inside].std()
    return image + alpha * (patch - image), alpha > VISIBLE


def warp(image: np.ndarray, _: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A whirl: the texture turned about a point, most in its middle; masked where it moved by over a pixel."""
    size = image.shape[0]
    radius = random.uniform(30, 50)
    centre = random.uniform(radius, size - radius, 2)
    rows, columns = np.mgrid[:size, :size].astype(float)
    y, x = rows - centre[0], columns - centre[1]
    fall = np.clip(1 - np.hypot(y, x) / radius, 0, 1) ** 2 * (3 - 2 * np.clip(1 - np.hypot(y, x) / radius, 0, 1))
    turn = random.choice([-1, 1]) * random.uniform(1.8, 2.6) * fall
    source = np.stack(
        [centre[0] + y * np.cos(turn) - x * np.sin(turn), centre[1] + y * np.sin(turn) + x * np.cos(turn)]
    )
    moved = np.hypot(source[0] - rows, source[1] - columns) > 1
    return ndimage.map_coordinates(image, source, order=1, mode="mirror"), ndimage.binary_fill_holes(moved)


DEFECTS: dict[str, Defect] = {"foreign": foreign, "hole": hole, "scratch": scratch, "stain": stain, "warp": warp}


def _blob(size: int, radius: float, roughness: float, random: np.random.Generator) -> np.ndarray:
    """Coverage (size, size) of an irregular disc: its radius varies along the rim by smooth waves."""
    turns = np.linspace(0, 2 * np.pi, 90, endpoint=False)
    rim = np.ones_like(turns)
    for wave in range(2, 6):
        rim += roughness / wave * random.normal() * np.cos(wave * turns + random.uniform(0, 2 * np.pi))
    rim = radius * np.clip(rim, 0.5, 1.6)
    centre = random.uniform(1.7 * radius, size - 1.7 * radius, 2)
    points = [(centre[0] + r * np.cos(t), centre[1] + r * np.sin(t)) for r, t in zip(rim, turns, strict=True)]
    return _drawn(size, lambda draw: draw.polygon([(OVERSAMPLE * x, OVERSAMPLE * y) for x, y in points], fill=255))


def _drawn(size: int, paint: Callable[[ImageDraw.ImageDraw], None]) -> np.ndarray:
    """What ``paint`` draws in white, as anti-aliased coverage 0 to 1 of shape (size, size)."""
    canvas = Image.new("L", (size * OVERSAMPLE, size * OVERSAMPLE))
    paint(ImageDraw.Draw(canvas))
    return np.asarray(canvas.resize((size, size), Image.Resampling.BOX), dtype=float) / 255
