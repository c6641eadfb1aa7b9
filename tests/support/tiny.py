"""A tiny data set and a tiny configuration that train in seconds."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

TINY: dict[str, Any] = {
    "teacher.name": "test_resnet",  # the smallest that timm has with levels at strides 4, 8 and 16
    "teacher.weights": "none",
    "teacher.image_size": (64, 64),
    "memory.items": 16,
    "training.epochs": 2,
    "training.batch_size": 4,
    "training.validation_share": 0.2,
}


def make_category(
    root: Path, *, train: int = 10, good: int = 3, bad: int = 3, size: tuple[int, int] = (72, 80)
) -> Path:
    """A category in the MVTec layout: noise on a gradient, defects are bright squares with exact masks."""
    generator = np.random.default_rng(0)

    def image() -> np.ndarray:
        ramp = np.linspace(60, 140, size[1])[None, :, None] * np.ones((*size[:1], 1, 3))
        return np.clip(ramp + generator.normal(0, 12, (*size, 3)), 0, 255).astype(np.uint8)

    for folder, count in (("train/good", train), ("test/good", good)):
        for index in range(count):
            path = root / folder / f"{index:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image()).save(path)
    for index in range(bad):
        picture, mask = image(), np.zeros(size, np.uint8)
        top = 10 + 10 * index
        picture[top : top + 16, 20:40] = 250
        mask[top : top + 16, 20:40] = 255
        for folder, name, array in (
            ("test/hole", f"{index:03}.png", picture),
            ("ground_truth/hole", f"{index:03}_mask.png", mask),
        ):
            path = root / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(path)
    return root


def picture(path: str | Path, seed: int = 90) -> Path:
    """Write noise of 64 x 64 pixels as a PNG, whatever its name."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, format="PNG")
    return Path(path)


def rows_of(folder: Path, name: str = "scores.csv") -> list[dict[str, str]]:
    """Return the rows of a table."""
    with open(folder / name, encoding="utf-8", errors="surrogateescape", newline="") as file:
        return list(csv.DictReader(file))
