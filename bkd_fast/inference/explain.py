"""Why a detector predicts what it does: intermediate results of each view, branch and part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bkd_fast.data.inputs import Decoded, ImageLike
from bkd_fast.inference.detector import Detector
from bkd_fast.model.ambient import settled
from bkd_fast.model.memory import SparseMemory


@dataclass(frozen=True)
class Explanation:
    """Intermediate results of one image, per view from fine to coarse, each at the size (h, w) of the view.

    A view is what the branches compare, named by its stride; with joint levels the view at stride 8 concatenates all
    levels.

    Attributes:
        distances: branch -> stride -> smoothed distance from the query at the network's size (H, W), in units of its
            mean over validation normals.
        offsets: stride -> (2, h, w), the mean over shots and taps of how far the support is fetched from, down and to
            the right, in pixels of the network's image.
        unaligned, aligned: stride -> (h, w), squared distance from the query of the support as matched or sampled, and
            as warped.
        kept: stride -> (h, w), how many memory items each feature is read from.
        strongest: stride -> (h, w), the index of the item of the largest weight; -1 where none counts.
        weight: stride -> (h, w), that item's weight; read from neighbors, others may be negative.
    """

    distances: Mapping[str, Mapping[int, np.ndarray]]
    offsets: Mapping[int, np.ndarray]
    unaligned: Mapping[int, np.ndarray]
    aligned: Mapping[int, np.ndarray]
    kept: Mapping[int, np.ndarray]
    strongest: Mapping[int, np.ndarray]
    weight: Mapping[int, np.ndarray]


@settled(inference=True)
def explain(detector: Detector, image: ImageLike) -> Explanation:
    """Return what happens to ``image`` inside ``detector``; parts that its model lacks are empty mappings.

    Args:
        image: see :meth:`bkd_fast.Detector.__call__`.

    Raises:
        BKDError: not an image.
    """
    model, size = detector.model, detector.config.teacher.image_size
    levels = detector.levels(Decoded(image, detector.config.data).fitted(size).unsqueeze(0))
    result = model.distill(levels, detector.support)
    distances = {
        branch: {
            stride: _array(level[0]) / scale
            for stride, level, scale in zip(model.strides[-len(maps) :], maps, model.map_scale[branch], strict=True)
        }
        for branch, maps in model.level_maps(result, size).items()
    }
    strides = model.strides if result.aligned else ()
    unaligned = model.unaligned(levels, detector.support) if strides else []
    kept, strongest, weight = {}, {}, {}
    if detector.config.memory is not None:
        remembered = len(model.memories)
        pairs = zip(model.strides[-remembered:], model.memories, result.teacher[-remembered:], strict=True)
        for stride, memory, level in pairs:
            assert isinstance(memory, SparseMemory)
            weights = memory.attention(level)[0]
            largest, item = weights.max(-1)
            kept[stride] = _array((weights != 0).sum(-1))
            strongest[stride] = _array(torch.where(largest > 0, item, -1))
            weight[stride] = _array(largest)
    return Explanation(
        distances=distances,
        offsets={
            stride: stride * _array(_mean_offset(offset))
            for stride, offset in zip(strides, result.offsets, strict=False)
        },
        unaligned=_distances(strides, result.teacher, unaligned),
        aligned=_distances(strides, result.teacher, result.aligned),
        kept=kept,
        strongest=strongest,
        weight=weight,
    )


def _mean_offset(offset: Tensor) -> Tensor:
    """(k, 2T, h, w) -> (2, h, w): down, right."""
    return offset.unflatten(1, (-1, 2)).mean((0, 1))


def _distances(strides: Sequence[int], query: Sequence[Tensor], support: Sequence[Tensor]) -> dict[int, np.ndarray]:
    pairs = zip(strides, query, support, strict=False)  # no support without forward branch
    return {stride: _array((q - s).square().mean(1)[0]) for stride, q, s in pairs}


def _array(values: Tensor) -> np.ndarray:
    return values.cpu().numpy()
