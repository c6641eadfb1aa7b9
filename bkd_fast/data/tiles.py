"""Overlapping tiles that cover a large image."""

from __future__ import annotations

from typing import Any, NamedTuple

from bkd_fast.errors import BKDError, ImageError, check_int

Size = tuple[int, int]


class Tile(NamedTuple):
    """Where a tile begins, in pixels of the image."""

    top: int
    left: int


def check_tiles(tile: int | Size, overlap: int) -> Size:
    """Return the tiles' (H, W).

    Raises:
        BKDError: not one or two positive numbers, or an overlap that is not from 0 to less than a tile.
    """
    given: Any = tile
    several = given.tolist() if hasattr(given, "tolist") else given
    sides = several if isinstance(several, (list, tuple)) else (several, several)
    try:
        rows, columns = (check_int("tile", side, 1) for side in sides)
    except ValueError as error:  # of a number, or of how many there are
        raise BKDError(f"tile is {several!r}: expected the height and width of tiles, or one number") from error
    if not 0 <= check_int("overlap", overlap) < min(rows, columns):
        raise BKDError(f"overlap is {overlap}: expected 0 to less than a tile of {(rows, columns)} pixels")
    return rows, columns


def overlap_of(tile: int) -> int:
    """Return how many pixels neighbouring tiles share in a run that is trained in tiles."""
    return tile // 4


def places(image: Size, tile: Size, overlap: int) -> list[Tile]:
    """Return where tiles begin that cover an image (H, W), row by row; the last of a row or column ends with it.

    Raises:
        ImageError: an image that is smaller than a tile.
    """
    if image[0] < tile[0] or image[1] < tile[1]:
        raise ImageError(f"an image of {image[0]} x {image[1]} pixels is smaller than a tile of {tile[0]} x {tile[1]}")
    rows, columns = (_starts(whole, part, overlap) for whole, part in zip(image, tile, strict=True))
    return [Tile(top, left) for top in rows for left in columns]


def _starts(whole: int, part: int, overlap: int) -> list[int]:
    return [*range(0, whole - part, part - overlap), whole - part]
