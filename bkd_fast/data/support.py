"""The support set: which normal images a query is compared with, and where they are kept."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bkd_fast.config import DataConfig
from bkd_fast.data.dataset import image_files
from bkd_fast.data.image import load_image, to_tensor
from bkd_fast.errors import BKDError

STORED = DataConfig(max_pixels=178_000_000)  # reads the run's own files, of the size that training accepted


def draw_support(count: int, shots: int, generator: torch.Generator, exclude: Collection[int] = ()) -> list[int]:
    """Draws ``shots`` of ``count`` images without replacement, none of ``exclude``.

    Raises:
        BKDError: fewer images than shots.
    """
    excluded = set(exclude)
    allowed = [index for index in range(count) if index not in excluded]
    if len(allowed) < shots:
        raise BKDError(f"{len(allowed)} normal image(s) to draw {shots} support images (shots) from: add images")
    chosen = torch.randperm(len(allowed), generator=generator)[:shots].tolist()
    return [allowed[index] for index in chosen]


def save_support(folder: Path, images: Sequence[np.ndarray]) -> None:
    """Write images (H, W, 3) uint8 as ``000.png`` and so on into a new folder."""
    folder.mkdir(parents=True)
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{index:03}.png")


def load_support(folder: Path, size: tuple[int, int], count: int | None = None) -> Tensor:
    """The first ``count`` images (None = all), (k, 3, *size) float32 in [0, 1], in the order they were saved.

    Raises:
        BKDError: no images there.
    """
    files = image_files(folder) if folder.is_dir() else []
    if not files:
        raise BKDError(f"there are no support images in {folder}: the run is incomplete")
    return torch.stack([to_tensor(load_image(path, STORED), size) for path in files[:count]])
