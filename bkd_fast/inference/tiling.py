"""Blend the maps of overlapping tiles into one."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bkd_fast.data.tiles import Size, Tile, places


class TileBlender:
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


def _ramp(length: int, overlap: int) -> Tensor:
    """Rises over ``overlap`` pixels from each edge, to one; nowhere zero."""
    distance = torch.arange(length, dtype=torch.float32)
    distance = torch.minimum(distance, distance.flip(0)) + 1
    return (distance / (overlap + 1)).clamp_max(1)
