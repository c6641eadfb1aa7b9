"""Large images in overlapping tiles, whose maps are blended into one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

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


class Mosaic:
    """Tiles over an image, and the map that their maps are blended into.

    The last tile of a row or column is moved back so that it ends with the image. Where tiles overlap, each counts the
    more the further a pixel is from that tile's edge; a pixel that only one tile has gets that tile's value.

    Args:
        image: (H, W). tile: (h, w). overlap: the least that neighbours have in common, in pixels.

    Raises:
        BKDError: an image that is smaller than a tile.
    """

    def __init__(self, image: Size, tile: Size, overlap: int) -> None:
        self.tile, self.places = tile, places(image, tile, overlap)
        self.total, self.weight = torch.zeros(image), torch.zeros(image)
        self.share = _ramp(tile[0], overlap).unsqueeze(1) * _ramp(tile[1], overlap)

    def tiles(self) -> Iterator[Tile]:
        """All tiles, row by row."""
        yield from self.places

    def add(self, place: Tile, tile_map: Tensor) -> None:
        """Blends in a tile's map (h, w)."""
        rows, columns = slice(place.top, place.top + self.tile[0]), slice(place.left, place.left + self.tile[1])
        self.total[rows, columns] += self.share * tile_map
        self.weight[rows, columns] += self.share

    def blended(self) -> Tensor:
        """The map (H, W) of all tiles that were added."""
        return self.total / self.weight


def _starts(whole: int, part: int, overlap: int) -> list[int]:
    step = part - overlap
    starts = list(range(0, whole - part, step))
    return [*starts, whole - part]


def _ramp(length: int, overlap: int) -> Tensor:
    """Rises over ``overlap`` pixels from each edge, to one; nowhere zero."""
    distance = torch.arange(length, dtype=torch.float32)
    distance = torch.minimum(distance, distance.flip(0)) + 1
    return (distance / (overlap + 1)).clamp_max(1)
