"""Images of every kind that a detector takes, as the network's input."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from bkd_fast.data import load_image, to_tensor
from bkd_fast.data.image import from_pil
from bkd_fast.errors import BKDError

ImageLike: TypeAlias = str | Path | Image.Image | np.ndarray | Tensor
Size: TypeAlias = tuple[int, int]


class Decoded:
    """A decoded image, in memory at its own size.

    Args:
        image: a path, a PIL image, an array ((H, W) grey or (H, W, 3) RGB, uint8), or a tensor ((3, H, W), uint8 or
            float in [0, 1]).

    Raises:
        BKDError: something that is not an image; the message says what it was.
    """

    def __init__(self, image: ImageLike) -> None:
        self.values: np.ndarray | Tensor  # (H, W, 3) uint8, or (3, H, W) in [0, 1]
        if isinstance(image, Tensor):
            self.values = _checked_tensor(image)
        elif isinstance(image, (str, Path)):
            self.values = load_image(Path(image))
        elif isinstance(image, Image.Image):
            self.values = from_pil(image)
        elif isinstance(image, np.ndarray):
            self.values = _checked_array(image)
        else:
            raise no_image(image)

    @property
    def size(self) -> Size:
        """(H, W)."""
        shape = self.values.shape[1:] if isinstance(self.values, Tensor) else self.values.shape[:2]
        return shape[0], shape[1]

    def array(self) -> np.ndarray:
        """(H, W, 3) uint8; tensors are rounded."""
        if not isinstance(self.values, Tensor):
            return self.values
        return (self.values * 255).round().byte().permute(1, 2, 0).cpu().numpy()

    def fitted(self, size: Size, top: int = 0, left: int = 0, part: Size | None = None) -> Tensor:
        """The image, or the part of it that begins at (top, left), as (3, *size) float32 in [0, 1]."""
        rows, columns = part or self.size
        if not isinstance(self.values, Tensor):
            return to_tensor(self.values[top : top + rows, left : left + columns], size)
        cut = self.values[:, top : top + rows, left : left + columns].float()
        if (rows, columns) == size:
            return cut
        return F.interpolate(cut[None], size=size, mode="bilinear", antialias=True)[0]


def no_image(value: object) -> BKDError:
    """The error for something of another type."""
    return BKDError(
        f"an image of type {type(value).__name__}: expected a path, a PIL image, an array or a tensor, or several"
    )


def _checked_tensor(image: Tensor) -> Tensor:
    if image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
        raise BKDError(
            f"an image tensor of shape {tuple(image.shape)}: expected (3, H, W), or (N, 3, H, W) for a batch"
        )
    if image.dtype == torch.uint8:
        return image.float() / 255
    if not image.is_floating_point():
        raise BKDError(f"an image tensor of {image.dtype}: expected uint8, or floating point in [0, 1]")
    if not (torch.isfinite(image).all() and image.min() >= 0 and image.max() <= 1):
        raise BKDError(
            "an image tensor with values outside [0, 1] or NaN: divide 8-bit values by 255; do not normalise"
        )
    return image


def _checked_array(array: np.ndarray) -> np.ndarray:
    if (
        array.dtype != np.uint8
        or array.ndim not in (2, 3)
        or 0 in array.shape
        or (array.ndim == 3 and array.shape[2] != 3)
    ):
        raise BKDError(
            f"an image array of shape {array.shape}, {array.dtype}: expected uint8 of shape (H, W) or (H, W, 3) RGB"
        )
    return np.repeat(array[:, :, None], 3, axis=2) if array.ndim == 2 else array
