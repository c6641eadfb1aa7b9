"""Overlapping tiles that cover a large image."""

from __future__ import annotations

from typing import NamedTuple

from bkd_fast.errors import BKDError

Size = tuple[int, int]


class Tile(NamedTuple):
    """Where a tile begins, in pixels of the image."""

    top: int
    left: int


def check_tiles(tile: int | Size, overlap: int) -> Size:
    """The tiles' (H, W).

    Raises:
        BKDError: not one or two positive numbers, or an overlap that is not from 0 to less than a tile.
    """
    size = (tile, tile) if isinstance(tile, int) else tuple(tile)
    if len(size) != 2 or any(not isinstance(length, int) or length < 1 for length in size):
        raise BKDError(f"tile is {tile!r}: expected the height and width of tiles in pixels, or one number for both")
    if not 0 <= overlap < min(size):
        raise BKDError(f"overlap is {overlap}: expected a number of pixels from 0 to less than a tile of {size}")
    return size[0], size[1]


def overlap_of(tile: int) -> int:
    """Return how many pixels neighbouring tiles share in a run that is trained in tiles."""
    return tile // 4


def places(image: Size, tile: Size, overlap: int) -> list[Tile]:
    """Return where tiles begin that cover an image (H, W), row by row; the last of a row or column ends with it.

    Raises:
        BKDError: an image that is smaller than a tile.
    """
    if image[0] < tile[0] or image[1] < tile[1]:
        raise BKDError(
            f"an image of {image[0]} x {image[1]} pixels is smaller than a tile of {tile[0]} x {tile[1]}: "
            "take it whole, or use smaller tiles"
        )
    rows, columns = (_starts(whole, part, overlap) for whole, part in zip(image, tile, strict=True))
    return [Tile(top, left) for top in rows for left in columns]


def _starts(whole: int, part: int, overlap: int) -> list[int]:
    step = part - overlap
    starts = list(range(0, whole - part, step))
    return [*starts, whole - part]
