"""From an image to a prediction in three stages, of which only the middle one needs the network: whole, or in tiles."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bkd_fast.data.inputs import Decoded, ImageLike, Size
from bkd_fast.data.tiles import check_tiles
from bkd_fast.inference.tiling import TileBlender

# Images (N, 3, h, w) in [0, 1] of the network's size -> scores (N,) and maps (N, h, w).
Score = Callable[[Tensor], tuple[Tensor, Tensor]]
# The score of an image and its map (H, W), as a prediction.
Decide = Callable[[float, np.ndarray], "Prediction"]


@dataclass(frozen=True)
class Prediction:
    """What the detector says of one image.

    ``score``: raw and unbounded, higher is more anomalous. ``label``: True where it is above the threshold.
    ``anomaly_map``: (H, W) float32, raw, at the image's own size. ``mask``: (H, W) bool, pixels above the pixel
    threshold. ``normalized_score``: the score from 0 to 1, 0.5 at the threshold. ``p_value``: share of good images that
    score as high, from 1 / (n + 1) for n good images to 1.
    """

    score: float
    label: bool
    anomaly_map: np.ndarray
    mask: np.ndarray
    normalized_score: float
    p_value: float


class Stages(NamedTuple):
    """``prepare`` an image, ``judge`` a batch of what that gave, ``finish`` each: all but ``judge`` in any thread."""

    prepare: Callable[[ImageLike], Any]
    judge: Callable[[list[Any]], list[Any]]
    finish: Callable[[Any], Prediction]

    def run(self, images: list[ImageLike], batch: int) -> list[Prediction]:
        """One stage after the other, on ``batch`` images at a time."""
        found: list[Prediction] = []
        for start in range(0, len(images), batch):
            prepared = [self.prepare(image) for image in images[start : start + batch]]
            found += [self.finish(judged) for judged in self.judge(prepared)]
        return found


def whole(size: Size, score: Score, decide: Decide) -> Stages:
    """Images are resized to ``size``, what the network takes, and their maps to the images' own sizes."""

    def prepare(image: ImageLike) -> tuple[Tensor, Size]:
        decoded = Decoded(image)
        return decoded.fitted(size), decoded.size

    def judge(batch: list[tuple[Tensor, Size]]) -> list[tuple[float, Tensor, Size]]:
        inputs, sizes = zip(*batch, strict=True)
        scores, maps = score(torch.stack(inputs))
        return list(zip(scores.tolist(), maps, sizes, strict=True))

    def finish(judged: tuple[float, Tensor, Size]) -> Prediction:
        return decide(judged[0], _resized(*judged[1:]).numpy())

    return Stages(prepare, judge, finish)


def tiled(size: Size, score: Score, decide: Decide, batch: int, tile: int | Size, overlap: int) -> Stages:
    """Images are judged tile by tile; of the tiles no more than ``batch`` are held at a time.

    Raises:
        BKDError: see :func:`bkd_fast.data.tiles.check_tiles`.
    """
    shape = check_tiles(tile, overlap)

    def prepare(image: ImageLike) -> tuple[Decoded, TileBlender]:
        decoded = Decoded(image)
        return decoded, TileBlender(decoded.size, shape, overlap)

    def judge(images: list[tuple[Decoded, TileBlender]]) -> list[tuple[float, TileBlender]]:
        return [(judge_one(image, mosaic), mosaic) for image, mosaic in images]

    def judge_one(image: Decoded, mosaic: TileBlender) -> float:
        places, highest = list(mosaic.tiles()), -math.inf
        for start in range(0, len(places), batch):
            group = places[start : start + batch]
            scores, maps = score(torch.stack([image.fitted(size, *place, shape) for place in group]))
            highest = max(highest, scores.max().item())
            for place, found in zip(group, maps, strict=True):
                mosaic.add(place, _resized(found, shape))
        return highest

    def finish(judged: tuple[float, TileBlender]) -> Prediction:
        return decide(judged[0], judged[1].blended().numpy())

    return Stages(prepare, judge, finish)


@torch.inference_mode()
def _resized(anomaly_map: Tensor, size: Size) -> Tensor:
    return F.interpolate(anomaly_map[None, None], size=size, mode="bilinear", align_corners=False)[0, 0].cpu()
