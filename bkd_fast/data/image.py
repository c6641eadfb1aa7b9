"""Image files of any common kind, as RGB arrays and as network input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from bkd_fast.errors import BKDError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm"})


class ImageError(BKDError):
    """A file that cannot be decoded as an image; the message names it."""


def load_image(path: str | Path) -> np.ndarray:
    """Decodes grey, RGB, RGBA, palette, CMYK or 16-bit images, turned as their EXIF orientation says.

    Returns:
        (H, W, 3) uint8 RGB. 16-bit values keep their upper byte; transparency is laid over white.

    Raises:
        ImageError: a missing, empty, truncated or undecodable file, or one of more pixels than Pillow's safety limit.
    """
    return from_pil(_decoded(Path(path)))


def load_mask(path: str | Path) -> np.ndarray:
    """Decodes a ground-truth mask: (H, W) bool, True where any channel of colour is above zero.

    Raises:
        ImageError: as :func:`load_image`.
    """
    image = ImageOps.exif_transpose(_decoded(Path(path)))
    array = np.asarray(image.convert("RGB") if image.mode in ("P", "PA", "LA") else image)
    return array > 0 if array.ndim == 2 else np.any(array[..., :3] > 0, axis=2)


def from_pil(image: Image.Image) -> np.ndarray:
    """A decoded PIL image of any mode as (H, W, 3) uint8 RGB, turned as its EXIF orientation says."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        return np.repeat(_eight_bits(np.asarray(image), image.mode)[:, :, None], 3, axis=2)
    if "A" in image.getbands() or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, layer)
    return np.array(image.convert("RGB"))


def to_tensor(image: np.ndarray, size: tuple[int, int]) -> Tensor:
    """(H, W, 3) uint8 -> (3, *size) float32 in [0, 1], resized bilinearly with antialiasing, not cropped."""
    tensor = torch.from_numpy(image).permute(2, 0, 1).float() / 255
    if image.shape[:2] == tuple(size):
        return tensor
    return F.interpolate(tensor[None], size=size, mode="bilinear", antialias=True, align_corners=False)[0]


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) uint8 -> (*size, 3) uint8, as the network sees it."""
    return (to_tensor(image, size) * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()


def resize_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W) bool -> ``size``, by nearest neighbour."""
    if mask.shape == tuple(size):
        return mask
    return np.array(Image.fromarray(mask).resize((size[1], size[0]), Image.Resampling.NEAREST))


def image_files(folder: Path) -> list[Path]:
    """Files below ``folder`` with an image suffix in any case, sorted; hidden ones are left out."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def _decoded(path: Path) -> Image.Image:
    try:
        if path.stat().st_size == 0:
            raise ImageError(f"{path} is empty (0 bytes): expected an image")
        with Image.open(path) as image:
            # Pillow only warns between its limit and twice that; such an image is refused here as well. A warning
            # filter would not do: it belongs to the whole process, and images are decoded in threads.
            if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError(f"{image.width} x {image.height}")
            image.load()
            return image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(
            f"{path} has more pixels than is safe to decode ({error}); raise PIL.Image.MAX_IMAGE_PIXELS if it is meant"
        ) from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{path} is not an image that can be decoded") from error
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"{path} cannot be decoded, it may be truncated or damaged ({error})") from error


def _eight_bits(values: np.ndarray, mode: str) -> np.ndarray:
    """16-bit integers by their upper byte; floats as they are if in [0, 1], else in [0, 255]."""
    if mode == "F":
        scale = 255.0 if np.nanmax(values, initial=0) <= 1 else 1.0
        return np.clip(np.nan_to_num(values) * scale, 0, 255).astype(np.uint8)
    return np.clip(values.astype(np.int64) >> 8, 0, 255).astype(np.uint8)
