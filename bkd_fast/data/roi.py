"""The region of interest: what is outside is neither learned nor scored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from bkd_fast.config import DataConfig
from bkd_fast.data.image import DEFAULT, load_image
from bkd_fast.errors import BKDError, ImageError

FILL = (124, 116, 104)  # ImageNet's mean colour, close to zero once normalised


def load_roi(path: str | Path, config: DataConfig = DEFAULT) -> np.ndarray:
    """Return a mask, (H, W) bool, True where an image is looked at.

    Raises:
        BKDError: not an image; values other than zero and one other; or nothing above zero.
    """
    if Path(path).is_dir():
        raise BKDError(f"the mask {path} is a folder: expected one image, the mask of all images")
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
        raise ImageError(
            f"{name} is {size[1]} x {size[0]} pixels and the mask of the region of interest {columns} x {rows}: they "
            "must be of one size, or of one aspect"
        )
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
