"""Large images in overlapping tiles: each tile is predicted as an image, and the maps are blended into one."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bkd_fast.data.inputs import Decoded, ImageLike
from bkd_fast.data.roi import shrink_roi
from bkd_fast.data.tiles import Size, Tile, check_tiles, places
from bkd_fast.errors import BKDError, ImageError
from bkd_fast.inference.prediction import Prediction, Predictor, RawPrediction, resize_map

if TYPE_CHECKING:
    from bkd_fast.inference.detector import Detector


class TiledImage(NamedTuple):
    """A decoded image, what its tiles' maps are blended in, and what of it is looked at, (H, W) bool."""

    image: Decoded
    blender: TileBlender
    roi: np.ndarray | None


class TiledDetector(Predictor[TiledImage]):
    """A detector that predicts tile by tile.

    The map is blended from the tiles' maps, the score summed over theirs: :meth:`bkd_fast.model.BKD.tiles_score`.

    Args:
        detector: predicts the tiles; thresholds are its own.
        tile: (height, width) of the tiles in pixels of the image, or one number for both.
        overlap: pixels that neighbouring tiles share, at least.

    Raises:
        BKDError: see :func:`bkd_fast.data.tiles.check_tiles`.
    """

    batch = 1  # images; the tiles of one fill the detector's batches

    def __init__(self, detector: Detector, tile: int | Size, overlap: int = 0) -> None:
        if detector.unified is not None:
            raise BKDError("the run is one model of several categories, and a tile shows none: predict whole images")
        self.detector, self.overlap = detector, overlap
        self.tile = check_tiles(tile, overlap)

    def preprocess(self, image: ImageLike) -> TiledImage:
        """Return the decoded image and its tiles.

        Raises:
            ImageError: not an image, or one that is smaller than a tile.
        """
        decoded = Decoded(image, self.detector.config.data).within(self.detector.roi_of(image), image)
        try:
            return TiledImage(decoded, TileBlender(decoded.size, self.tile, self.overlap), decoded.roi)
        except ImageError as error:
            raise ImageError(f"{image}: {error}" if isinstance(image, (str, PathLike)) else str(error)) from error

    def predict(self, batch: Sequence[TiledImage]) -> list[RawPrediction]:
        """Return the score and the blended map of each image."""
        return [self._predict(*image) for image in batch]

    def postprocess(self, raw: RawPrediction) -> Prediction:
        """Return the prediction, decided by the detector's thresholds."""
        return self.detector.postprocess(raw)

    def _predict(self, image: Decoded, blender: TileBlender, roi: np.ndarray | None) -> RawPrediction:
        size, each = self.detector.config.teacher.size, self.detector.batch
        tiles, parts = blender.places, []
        regions = None if roi is None else self._regions(roi, tiles)
        if regions is not None:
            for tile in [tile for tile in tiles if not regions[tile].any()]:
                blender.add(tile, torch.zeros(self.tile))
            tiles = [tile for tile in tiles if regions[tile].any()]
        for start in range(0, len(tiles), each):
            group = tiles[start : start + each]
            region = None if regions is None else torch.stack([regions[tile] for tile in group])
            inputs = torch.stack([image.fitted(size, *tile, self.tile) for tile in group])
            scores, maps = self.detector.score(inputs, region=region)
            parts.append(scores)
            for tile, tile_map in zip(group, maps, strict=True):
                blender.add(tile, resize_map(tile_map, self.tile))
        score = self.detector.model.tiles_score(torch.cat(parts)).item()
        return RawPrediction(score, blender.blended(), image.size, roi)

    def _regions(self, roi: np.ndarray, tiles: Sequence[Tile]) -> dict[Tile, Tensor]:
        """Return what of each tile is looked at, at the network's size.

        Raises:
            ImageError: nothing of any tile.
        """
        (rows, columns), size = self.tile, self.detector.config.teacher.size
        regions = {
            tile: shrink_roi(roi[tile.top : tile.top + rows, tile.left : tile.left + columns], size) for tile in tiles
        }
        if not any(region.any() for region in regions.values()):
            raise ImageError("nothing of the region of interest is left in any tile at the network's size")
        return regions


class TileBlender:
    """Tiles over an image, and the map that their maps are blended into.

    The last tile of a row or column is moved back so that it ends with the image. Where tiles overlap, each counts the
    more the further a pixel is from that tile's edge; a pixel that only one tile has gets that tile's value.

    Args:
        image: (H, W). tile: (h, w). overlap: the least that neighbours have in common, in pixels.

    Raises:
        ImageError: an image that is smaller than a tile.
    """

    def __init__(self, image: Size, tile: Size, overlap: int) -> None:
        self.tile, self.places = tile, places(image, tile, overlap)
        self.total, self.weight = torch.zeros(2, *image, dtype=torch.float32, device="cpu")
        self.share = _ramp(tile[0], overlap).unsqueeze(1) * _ramp(tile[1], overlap)

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
    distance = torch.arange(length, dtype=torch.float32, device="cpu")
    distance = torch.minimum(distance, distance.flip(0)) + 1
    return (distance / (overlap + 1)).clamp_max(1)
