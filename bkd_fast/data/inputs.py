"""Images of every kind that a detector takes, as the network's input."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from bkd_fast.config import DataConfig
from bkd_fast.data.image import DEFAULT, check_filled, from_array, from_pil, load_image, to_tensor
from bkd_fast.data.roi import fill_outside, fit_roi
from bkd_fast.errors import BKDError, ImageError

Plain: TypeAlias = str | Path | bytes | BinaryIO | Image.Image | np.ndarray
Size: TypeAlias = tuple[int, int]
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Masked:
    """An image, and what of it is looked at, for a run with a mask for each image.

    ``roi``: the path of a mask (:func:`bkd_fast.data.roi.load_roi`), or an array (H, W), above zero inside.
    """

    image: Plain | Tensor
    roi: str | Path | np.ndarray


OneImage: TypeAlias = Plain | Masked
ImageLike: TypeAlias = OneImage | Tensor


def masked(image: Plain, roi: str | Path | None) -> OneImage:
    """Return an image with the mask of its region of interest, if it has one."""
    return image if roi is None else Masked(image, roi)


class Decoded:
    """A decoded image, in memory at its own size.

    Args:
        image: a path, the bytes of an image file or a binary file object; a PIL image at its current page; an array of
            any type and stride ((H, W), (H, W, 1), (H, W, 3) RGB, (H, W, 4) RGBA, or (3, H, W)); or a tensor of any
            type ((3, H, W), (1, H, W) or (H, W), or the arrays' shapes).
        config: how pixels are read; see :func:`bkd_fast.data.image.eight_bits` for values that are not uint8.

    Raises:
        ImageError: something that is not an image; the message says what it was.
    """

    def __init__(self, image: ImageLike, config: DataConfig = DEFAULT) -> None:
        self.values: np.ndarray | Tensor  # (H, W, 3) uint8, or (3, H, W) in [0, 1]
        self.roi: np.ndarray | None = None  # (H, W) bool, what is looked at; None: everything
        if isinstance(image, Masked):
            image = image.image
        if isinstance(image, Tensor):
            self.values = _from_tensor(image, config)
        elif isinstance(image, np.ndarray):
            self.values = from_array(image, config)
        elif isinstance(image, Image.Image):
            self.values = from_pil(image, config)
        elif is_encoded(image):
            self.values = load_image(image, config)
        else:
            raise no_image(image)

    @property
    def size(self) -> Size:
        """(H, W)."""
        shape = self.values.shape[1:] if isinstance(self.values, Tensor) else self.values.shape[:2]
        return shape[0], shape[1]

    def within(self, roi: np.ndarray | None, name: object = None) -> Decoded:
        """Return this image, of one colour outside a region of interest (H, W) bool of the same aspect.

        Raises:
            ImageError: another aspect.
        """
        if roi is not None:
            named = name if isinstance(name, (str, os.PathLike)) else "the image"
            self.roi = fit_roi(roi, self.size, named)
            self.values = fill_outside(self.values, self.roi)
        return self

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


def is_encoded(image: object) -> bool:
    """Whether this is a path, the content of a file, or a file object."""
    return isinstance(image, (str, os.PathLike, bytes, bytearray, memoryview)) or hasattr(image, "read")


def is_one_image(image: object) -> bool:
    """Whether this is an image, and not several."""
    if isinstance(image, Tensor):
        return image.ndim != 4
    return isinstance(image, (Image.Image, np.ndarray, Masked)) or is_encoded(image)


def taken(image: ImageLike) -> ImageLike:
    """Return the image as it is now: whoever gave it may use its buffer for the next one.

    Arrays, tensors and PIL images are copied, file objects are read; what cannot be is returned as it is.
    """
    try:
        if isinstance(image, Masked):
            return replace(image, image=taken(image.image))  # type: ignore[arg-type]  # of the kind that it was
        if isinstance(image, Tensor):
            return image.detach().clone()
        if isinstance(image, np.ndarray):
            return image.copy()
        if isinstance(image, Image.Image):
            copy = image.copy()
            for name in ("filename", "format"):
                if hasattr(image, name):
                    setattr(copy, name, getattr(image, name))
            return copy
        if hasattr(image, "read"):
            return image.read()
        return bytes(image) if isinstance(image, (bytearray, memoryview)) else image
    except Exception:  # its own error, which it raises again where it is decoded
        return image


def no_image(value: object) -> BKDError:
    """The error for something of another type."""
    return ImageError(
        f"an image of type {type(value).__name__}: expected a path, a PIL image, an array or a tensor, or several"
    )


def _from_tensor(image: Tensor, config: DataConfig) -> np.ndarray | Tensor:
    shape = tuple(image.shape)
    if image.layout != torch.strided or image.is_complex() or image.is_quantized or image.is_meta:
        raise ImageError(f"a tensor of {image.layout}, {image.dtype}, {image.device}: expected a dense one of numbers")
    image = image.detach()
    image = image.float() if image.is_floating_point() and image.dtype not in FLOATS else image
    if image.ndim == 2:
        image = image[None]
    last = image.ndim == 3 and shape[-1] in (1, 3, 4) and shape[0] not in (1, 3)
    if (not last and (image.ndim != 3 or image.shape[0] not in (1, 3))) or 0 in shape:
        raise ImageError(f"an image tensor of shape {shape}: expected (3, H, W), or (N, 3, H, W) for a batch")
    if (last and shape[-1] == 4) or image.dtype not in (torch.uint8, *FLOATS):
        array = (image if last else image.permute(1, 2, 0)).cpu()
        return from_array(
            (array.float() if array.dtype == torch.bfloat16 else array).numpy(), config, "an image tensor"
        )
    image = image.permute(2, 0, 1) if last else image
    image = image.expand(3, -1, -1)
    if image.dtype == torch.uint8:
        return image.float() / 255
    white = config.float_white or 1.0
    if not (torch.isfinite(image).all() and image.min() >= 0 and image.max() <= white):
        raise ImageError(f"an image tensor with values outside [0, {white:g}] or NaN: divide by 255, do not normalise")
    if white == 1:
        return image
    check_filled(float(image.max()), 1, white, "data.float_white", "an image tensor")
    return image.float() / white
