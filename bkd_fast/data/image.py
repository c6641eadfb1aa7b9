"""Images of every kind, as RGB arrays and as network input: the one place where pixels come in.

Files are decoded by content, by the formats of FORMATS alone, and never above a limit of pixels. Values of more than 8
bits follow one rule a run, :class:`bkd_fast.config.DataConfig`, whether they come from a file, an array or a tensor.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from torch import Tensor

from bkd_fast.config import DataConfig
from bkd_fast.errors import BKDError, ImageError

log = logging.getLogger("bkd_fast")
Encoded: TypeAlias = str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO

# What Pillow may decode. It goes by content, not by name: without this list a file called .png runs Ghostscript.
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF", "PPM", "AVIF", "JPEG2000")
SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".avif", ".jp2"}
    | {".ppm", ".pgm", ".pbm", ".pnm"}
)
INTEGER_WHITES, FLOAT_WHITES = (255, 1023, 4095, 16383, 65535), (1.0, 255.0, 65535.0)
RAW_MODE = "bkd_fast raw mode"  # of a decoded image's info: Pillow forgets how pixels lay in the file
DEFAULT = DataConfig()


def load_image(source: Encoded, config: DataConfig = DEFAULT) -> np.ndarray:
    """Decode a grey, RGB, RGBA, palette, CMYK, 16-bit or float image, turned as its EXIF orientation says.

    Args:
        source: a path, the bytes of a file, or a binary file object.
        config: the run's; see :func:`eight_bits` for values of more than 8 bits.

    Returns:
        (H, W, 3) uint8 RGB; transparency is laid over white.

    Raises:
        ImageError: a missing, empty, truncated or undecodable file, one of another format, of more pixels than
            ``config.max_pixels`` or of several pages. The message names the file.
    """
    return from_pil(_decoded(source, config), config, _name(source))


def load_mask(source: Encoded, config: DataConfig = DEFAULT, *, labels: bool = False) -> np.ndarray:
    """Decode a ground-truth mask: (H, W) bool, True where any channel of colour is above zero.

    Args:
        source, config: as for :func:`load_image`.
        labels: a palette image is True where its index is above zero, whatever colour that is.

    Raises:
        ImageError: as :func:`load_image`.
    """
    image = _upright(_decoded(source, config), _name(source))
    coloured = image.mode in ("PA", "LA") or (image.mode == "P" and not labels)
    array = np.asarray(image.convert("RGB") if coloured else image)
    return array > 0 if array.ndim == 2 else np.any(array[..., :3] > 0, axis=2)


def from_pil(image: Image.Image, config: DataConfig = DEFAULT, name: str = "a PIL image") -> np.ndarray:
    """Return a PIL image of any mode, at its current page, as (H, W, 3) uint8 RGB, turned as its EXIF says.

    Raises:
        ImageError: too many pixels, pixels that cannot be decoded, a mode that is no picture, or values outside the
            range of ``config``.
    """
    _check_pixels(image.size, config, name)
    coarse = len(image.getbands()) > 1 and ";16" in _raw_mode(image)
    image = _upright(image, name)
    try:
        if _wide(image):
            return from_array(np.asarray(image), config, name)
        if "A" in image.getbands() or "transparency" in image.info:
            layer = image.convert("RGBA")
            white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, layer)
        array = np.array(image.convert("RGB"))
    except BKDError:
        raise
    except Exception as error:  # a lazy image's pixels are only decoded here; see _decoded
        raise ImageError(f"{name} of mode {image.mode} cannot be read as a picture ({error})") from error
    if coarse and array.max() < 64:
        what = f"{name}: of 16-bit colour the upper byte is read, and here it is at most {array.max()} of 255"
        _warn_once("coarse", f"{what}: convert it to 8 bits")
    return array


def from_array(array: np.ndarray, config: DataConfig = DEFAULT, name: str = "an image array") -> np.ndarray:
    """Return an array of any type and stride as (H, W, 3) uint8 RGB, contiguous.

    Args:
        array: (H, W) or (H, W, 1) grey, (H, W, 3) RGB, (H, W, 4) RGBA, or (1, H, W) or (3, H, W).

    Raises:
        ImageError: another shape or type, or values outside the range of ``config``.
    """
    masked = isinstance(array, np.ma.MaskedArray)
    array = np.asarray(array)
    if array.ndim == 3 and array.shape[2] not in (1, 3, 4) and array.shape[0] in (1, 3):
        array = array.transpose(1, 2, 0)
    grey = array[:, :, None] if array.ndim == 2 else array
    if grey.ndim != 3 or grey.shape[2] not in (1, 3, 4) or not grey.size or masked:
        what = " masked" if masked else ""
        raise ImageError(
            f"{name} of shape {array.shape},{what} {array.dtype}: expected (H, W) or (H, W, 1) grey, (H, W, 3) RGB or "
            "(H, W, 4) RGBA; of several images a list"
        )
    values = eight_bits(grey, config, name)
    if values.shape[2] == 4:
        return from_pil(Image.fromarray(np.ascontiguousarray(values)), config, name)
    values = np.ascontiguousarray(np.repeat(values, 3, axis=2) if values.shape[2] == 1 else values)
    return values if values.flags.writeable else values.copy()


def eight_bits(values: np.ndarray, config: DataConfig = DEFAULT, name: str = "an image array") -> np.ndarray:
    """Return values of any type as uint8: one rule for files, arrays and tensors.

    uint8 stays as it is, and True is white. Of other integers ``w`` = ``config.integer_white`` is white: a value v
    becomes floor(256 v / (w + 1)), which for 65535 is the upper byte; larger values are white too, with a warning. Of
    floats ``config.float_white`` is white, rounded.

    Raises:
        ImageError: another type, negative values, or floats that are not finite or above white.
    """
    kind = values.dtype.kind
    if values.dtype == np.uint8:
        return values
    if kind == "b":
        return values.astype(np.uint8) * np.uint8(255)
    if kind not in "iuf":
        raise ImageError(f"{name} has values of type {values.dtype}: expected integers, floats or bool")
    low, high = values.min(), values.max()
    if kind == "f":
        white = config.float_white or FLOAT_WHITES[0]
        if not (low >= 0 and high <= white):  # NaN is neither
            raise ImageError(
                f"{name} has values outside [0, {white:g}] or NaN ({values.dtype}, from {low} to {high}): divide 8-bit "
                "values by 255, do not normalise, fill missing ones; or train with another data.float_white"
            )
        check_filled(high, 1, white, "data.float_white", name)
        return np.rint(values.astype(np.promote_types(values.dtype, np.float32)) * (255 / white)).astype(np.uint8)
    if low < 0:
        raise ImageError(f"{name} has negative values ({values.dtype}, from {low} to {high}): expected 0 for black")
    top = config.integer_white or INTEGER_WHITES[-1]
    if high > top:
        what = f"{name} has values up to {high}, and white is {top} (data.integer_white)"
        _warn_once(("above", top), f"{what}: larger values become white")
    check_filled(high, 255, top, "data.integer_white", name)
    values = values.astype(np.uint32) if values.dtype.itemsize < 4 else values
    return (np.minimum(values, top).astype(np.uint32) * 256 // (top + 1)).astype(np.uint8)


def infer_white(images: Iterable[object], config: DataConfig) -> DataConfig:
    """Return ``config`` with the whites that it leaves open, of integers and floats as large as these images hold.

    Without such images they stay open.

    Args:
        images: of any kind; those that cannot be read are left to whoever reads them. Only what has more than 8 bits is
            decoded.

    Raises:
        BKDError: floats above 65535, of which no white can be guessed.
    """
    tops = {"i": 0.0, "f": 0.0}
    if config.integer_white is None or config.float_white is None:
        for image in images:
            values = _wide_values(image, config)
            if values is not None and values.size and values.dtype.kind in "iuf":
                kind = "f" if values.dtype.kind == "f" else "i"
                tops[kind] = max(tops[kind], float(values.max()))
    whole, real = config.integer_white, config.float_white
    if whole is None and tops["i"]:
        whole = next((white for white in INTEGER_WHITES if tops["i"] <= white), INTEGER_WHITES[-1])
        _tell(tops["i"], whole, 255, "integers", "data.integer_white")
    if real is None and tops["f"]:
        real = next((white for white in FLOAT_WHITES if tops["f"] <= white), None)
        if real is None:
            raise BKDError(f"the training images have floats up to {tops['f']:g}: set data.float_white to their white")
        _tell(tops["f"], real, 1, "floats", "data.float_white")
    return DataConfig(whole, real, config.max_pixels, config.pages)


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


@cache
def _formats() -> tuple[str, ...]:
    """Return the formats of FORMATS that this Pillow has."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _decoded(source: Encoded, config: DataConfig, *, pixels: bool = True) -> Image.Image:
    """Return an image file's first page; without ``pixels`` only its header is read if it has 8 bits."""
    name = _name(source)
    try:
        if isinstance(source, (str, os.PathLike)):
            if Path(source).stat().st_size == 0:
                raise ImageError(f"{name} is empty (0 bytes): expected an image")
            file: Path | io.BytesIO = Path(source)
        else:
            content = bytes(source) if isinstance(source, (bytes, bytearray, memoryview)) else source.read()
            if not content:
                raise ImageError(f"{name} is empty (0 bytes): expected an image")
            file = io.BytesIO(content)
        with Image.open(file, formats=_formats()) as image:
            _check_pixels(image.size, config, name)
            # Of a phone's multi-picture JPEG the first is the photograph, the others are previews.
            pages = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
            if pages > 1 and config.pages == "one":
                raise ImageError(f"{name} has {pages} pages or frames: expected one, or data.pages=first (--pages)")
            image.info[RAW_MODE] = _raw_mode(image)
            if ImageFile.LOAD_TRUNCATED_IMAGES:
                _warn_once("truncated", f"{name}: PIL.ImageFile.LOAD_TRUNCATED_IMAGES is on, so cut files go unnoticed")
            if pixels or _wide(image):
                image.load()
            return image
    except BKDError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(_too_large(name, str(error), config)) from error
    except UnidentifiedImageError as error:
        formats = ", ".join(_formats())
        raise ImageError(f"{name} is not an image that can be decoded: expected one of {formats}") from error
    except MemoryError as error:
        raise ImageError(f"{name} needs more memory than there is: make it smaller, or lower --max-pixels") from error
    except FileNotFoundError as error:
        raise ImageError(f"{name} does not exist") from error
    except Exception as error:  # decoders raise what they like: SyntaxError, struct.error, IndexError, OverflowError …
        raise ImageError(f"{name} cannot be decoded, it may be truncated or damaged ({error})") from error


def _upright(image: Image.Image, name: str) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception as error:  # of damaged EXIF data, or of a lazy image's pixels; see _decoded
        raise ImageError(f"{name} cannot be decoded, its pixels or EXIF data may be damaged ({error})") from error


def _check_pixels(size: tuple[int, int], config: DataConfig, name: str) -> None:
    if size[0] * size[1] > config.max_pixels:
        raise ImageError(_too_large(name, f"{size[0]} x {size[1]}", config))


def _too_large(name: str, size: str, config: DataConfig) -> str:
    return (
        f"{name} has more pixels than is safe to decode ({size}; at most {config.max_pixels:,}): make it smaller, or "
        "raise data.max_pixels (--max-pixels) if it is meant"
    )


def _wide(image: Image.Image) -> bool:
    """Whether a PIL image's values have more than 8 bits."""
    return image.mode.startswith("I") or image.mode == "F"


def _raw_mode(image: Image.Image) -> str:
    """Return how an image's pixels lie in its file, if that is known."""
    return str(image.info.get(RAW_MODE) or [tile[3] for tile in getattr(image, "tile", [])])


def _wide_values(image: object, config: DataConfig) -> np.ndarray | None:
    """Return the values of an image if they have more than 8 bits and can be read."""
    if isinstance(image, (str, os.PathLike, bytes, bytearray, memoryview)):
        try:
            image = _decoded(image, config, pixels=False)
        except ImageError:
            return None
    if isinstance(image, Image.Image):
        return np.asarray(image) if _wide(image) else None
    if isinstance(image, Tensor):
        image = image.detach().cpu().float().numpy() if image.is_floating_point() else image.cpu().numpy()
    return image if isinstance(image, np.ndarray) and image.dtype != np.uint8 else None


def check_filled(high: float, narrow: int, white: float, option: str, name: str) -> None:
    """Warn of values that look like those of a smaller range: 8 bits in 16, or [0, 1] in [0, 255]."""
    if 0 < high <= narrow < white:
        what = f"{name} has values up to {high:g} only, and white is {white:g} ({option} of the run)"
        _warn_once((option, white), f"{what}: it is nearly black; if its white is {narrow}, convert it first")


def _tell(top: float, white: float, narrow: int, what: str, option: str) -> None:
    """Say which white training images have, as a warning where their container is wider than their values."""
    level = logging.WARNING if what == "integers" and white <= narrow else logging.INFO
    log.log(level, "training images have %s up to %g: white is %g (%s)", what, top, white, option)


_said: set[object] = set()


def _warn_once(key: object, message: str) -> None:
    """Log a warning the first time in a process: a stream of thousands of images is one such case."""
    if key not in _said:
        _said.add(key)
        log.warning("%s (said once)", message)


def _name(source: object) -> str:
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    name = getattr(source, "name", None)
    return str(name) if isinstance(name, (str, os.PathLike)) else "an image in memory"
