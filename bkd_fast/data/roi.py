"""The region of interest: what is outside is neither learned nor scored. One mask for all images, or one for each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from bkd_fast.config import DataConfig
from bkd_fast.data.image import DEFAULT, SUFFIXES, load_image
from bkd_fast.errors import BKDError, ImageError, few

FILL = (124, 116, 104)  # ImageNet's mean colour, close to zero once normalised


def load_roi(path: str | Path, config: DataConfig = DEFAULT) -> np.ndarray:
    """Return a mask, (H, W) bool, True where an image is looked at.

    Raises:
        BKDError: not an image; values other than zero and one other; or nothing above zero.
    """
    try:
        image = load_image(path, config)
    except ImageError as error:
        raise BKDError(f"the mask of the region of interest cannot be used: {error}") from error
    values = np.unique(image)
    if len(values) > 2 or (len(values) == 2 and values[0]):
        raise BKDError(
            f"the mask {path} has {len(values)} values, from {values[0]} to {values[-1]}: expected zero outside the "
            "region of interest and one other value inside; save it as PNG, since JPEG blurs edges"
        )
    if not values[-1]:
        raise BKDError(f"the mask {path} is empty: expected pixels above zero where images are to be looked at")
    return np.asarray(image.any(2))


def fit_roi(roi: np.ndarray, size: tuple[int, int], name: object) -> np.ndarray:
    """Return a mask at the size (H, W) of an image, by nearest neighbour.

    Args:
        name: of the image, for the error.

    Raises:
        ImageError: the image has another aspect: more than a pixel is between their sizes once they are as wide.
    """
    rows, columns = roi.shape
    if (rows, columns) == size:
        return roi
    if abs(rows * size[1] / columns - size[0]) > 1:
        raise ImageError(f"{name} is {size[1]} x {size[0]} pixels and the mask {columns} x {rows}: expected one aspect")
    return np.array(Image.fromarray(roi).resize((size[1], size[0]), Image.Resampling.NEAREST))


def fill_outside(values: np.ndarray | Tensor, roi: np.ndarray) -> np.ndarray | Tensor:
    """Return an image, (H, W, 3) uint8 or (3, H, W) in [0, 1], of one colour outside ``roi`` (H, W)."""
    if isinstance(values, Tensor):
        inside = torch.from_numpy(roi).to(values.device)
        return torch.where(inside, values, torch.tensor(FILL, device=values.device).view(3, 1, 1) / 255)
    return np.where(roi[..., None], values, np.array(FILL, np.uint8))


def shrink_roi(roi: np.ndarray, size: tuple[int, int]) -> Tensor:
    """Return a mask at the size (h, w) of the network's input, bool: pixels of which at least half is inside."""
    return F.interpolate(torch.from_numpy(roi)[None, None].float(), size=size, mode="area")[0, 0] >= 0.5


def check_roi(values: np.ndarray) -> np.ndarray:
    """Return a mask in memory as (H, W) bool; see :func:`load_roi` for what it must be."""
    if values.ndim != 2 or values.dtype.kind not in "bui" or not values.any() or len(np.unique(values)) > 2:
        raise BKDError(f"a mask {values.shape}, {values.dtype}: expected (H, W), zero outside, one value inside")
    return np.asarray(values > 0)


def roi_files(folder: Path, names: Sequence[str]) -> list[Path]:
    """Return the mask of each image of a folder of masks: the same relative path, with or without ``_mask``.

    Args:
        names: of the images, relative to their folder; suffixes do not matter.

    Raises:
        BKDError: no such folder, an image without a mask, or with several.
    """
    if not folder.is_dir():
        raise BKDError(f"there is no folder {folder}: expected a mask of the region of interest for each image")
    masks: dict[str, Path] = {}
    for path in (path for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES):
        stem = path.relative_to(folder).with_suffix("").as_posix().removesuffix("_mask")
        if stem in masks:
            raise BKDError(f"it is ambiguous which mask is meant: {masks[stem]} or {path}")
        masks[stem] = path
    stems = [PurePosixPath(name).with_suffix("").as_posix() for name in names]
    missing = [name for name, stem in zip(names, stems, strict=True) if stem not in masks]
    if missing:
        raise BKDError(f"{len(missing)} of {len(names)} images have no mask in {folder}: {few(missing)}")
    return [masks[stem] for stem in stems]
