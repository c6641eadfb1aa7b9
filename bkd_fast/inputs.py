"""What a detector takes for an image, as the network's input."""

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


def network_input(image: ImageLike, size: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
    """The network's input (3, *size), float32 in [0, 1], and the image's own (H, W).

    Args:
        image: a path, a PIL image, an array ((H, W) grey or (H, W, 3) RGB, uint8), or a tensor ((3, H, W), uint8 or
            float in [0, 1]).

    Raises:
        BKDError: something that is not an image; the message says what it was.
    """
    if isinstance(image, Tensor):
        return _from_tensor(image, size)
    if isinstance(image, (str, Path)):
        array = load_image(Path(image))
    elif isinstance(image, Image.Image):
        array = from_pil(image)
    elif isinstance(image, np.ndarray):
        array = _checked_array(image)
    else:
        raise no_image(image)
    return to_tensor(array, size), (array.shape[0], array.shape[1])


def no_image(value: object) -> BKDError:
    """The error for something of another type."""
    return BKDError(
        f"an image of type {type(value).__name__}: expected a path, a PIL image, an array or a tensor, or several"
    )


def _from_tensor(image: Tensor, size: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
    if image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
        raise BKDError(
            f"an image tensor of shape {tuple(image.shape)}: expected (3, H, W), or (N, 3, H, W) for a batch"
        )
    if image.dtype == torch.uint8:
        image = image.float() / 255
    elif not image.is_floating_point():
        raise BKDError(f"an image tensor of {image.dtype}: expected uint8, or floating point in [0, 1]")
    if not (torch.isfinite(image).all() and image.min() >= 0 and image.max() <= 1):
        raise BKDError(
            "an image tensor with values outside [0, 1] or NaN: divide 8-bit values by 255; do not normalise"
        )
    own = (image.shape[1], image.shape[2])
    if own != size:
        image = F.interpolate(image[None].float(), size=size, mode="bilinear", antialias=True)[0]
    return image.float(), own


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
