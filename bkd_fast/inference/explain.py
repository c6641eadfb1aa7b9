"""Why a detector predicts what it does: intermediate results of each view, branch and part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bkd_fast.data.inputs import ImageLike
from bkd_fast.inference.detector import Detector
from bkd_fast.model.ambient import settled
from bkd_fast.model.memory import SparseMemory

View = int | str


@dataclass(frozen=True)
class Explanation:
    """Intermediate results of one image, per view from fine to coarse, each at the size (h, w) of the view.

    Views are what the branches compare, each under its stride, or under the name of its layer where strides are equal.
    With joint levels the one at the stride of the middle level (8 by default) is all of them side by side.

    Attributes:
        distances: branch -> view -> smoothed distance from the query at the network's size (H, W), in units of its
            mean over validation normals.
        offsets: view -> (2, h, w), the mean over shots and taps of how far the support is fetched from, down and to
            the right, in pixels of the network's image.
        unaligned, aligned: view -> (h, w), squared distance from the query of the support as matched or sampled, and
            as warped.
        kept: view -> (h, w), how many memory items each feature is read from.
        strongest: view -> (h, w), the index of the item of the largest weight; -1 where none counts.
        weight: view -> (h, w), that item's weight; read from neighbors, others may be negative.
    """

    distances: Mapping[str, Mapping[View, np.ndarray]]
    offsets: Mapping[View, np.ndarray]
    unaligned: Mapping[View, np.ndarray]
    aligned: Mapping[View, np.ndarray]
    kept: Mapping[View, np.ndarray]
    strongest: Mapping[View, np.ndarray]
    weight: Mapping[View, np.ndarray]


@settled(inference=True)
def explain(detector: Detector, image: ImageLike) -> Explanation:
    """Return what happens to ``image`` inside ``detector``; parts that its model lacks are empty mappings.

    Args:
        image: see :meth:`bkd_fast.Detector.__call__`.

    Raises:
        BKDError: not an image.
    """
    model, size = detector.model, detector.config.teacher.size
    given = detector.preprocess(image)
    levels = detector.levels(given.input.unsqueeze(0))
    region = None if given.region is None else given.region.unsqueeze(0).to(detector.device)
    result = model.distill(levels, detector.support, region=region)
    distances = {
        branch: {
            view: _array(level[0]) / scale
            for view, level, scale in zip(model.names[-len(maps) :], maps, model.map_scale[branch], strict=True)
        }
        for branch, maps in model.level_maps(result, size).items()
    }
    views: Sequence[View] = model.names if result.aligned else ()
    unaligned = model.unaligned(levels, detector.support) if views else []
    kept, strongest, weight = {}, {}, {}
    if detector.config.memory is not None:
        remembered = len(model.memories)
        pairs = zip(model.names[-remembered:], model.memories, result.teacher[-remembered:], strict=True)
        for view, memory, level in pairs:
            assert isinstance(memory, SparseMemory)
            weights = memory.attention(level)[0]
            largest, item = weights.max(-1)
            kept[view] = _array((weights != 0).sum(-1))
            strongest[view] = _array(torch.where(largest > 0, item, -1))
            weight[view] = _array(largest)
    return Explanation(
        distances=distances,
        offsets={
            view: stride * _array(offset.unflatten(1, (-1, 2)).mean((0, 1)))  # (k, 2T, h, w) -> (2, h, w)
            for view, stride, offset in zip(views, model.strides, result.offsets, strict=False)
        },
        unaligned=_distances(views, result.teacher, unaligned),
        aligned=_distances(views, result.teacher, result.aligned),
        kept=kept,
        strongest=strongest,
        weight=weight,
    )


def _distances(views: Sequence[View], query: Sequence[Tensor], support: Sequence[Tensor]) -> dict[View, np.ndarray]:
    triples = zip(views, query, support, strict=False)  # no support without forward branch
    return {view: _array((q - s).square().mean(1)[0]) for view, q, s in triples}


def _array(values: Tensor) -> np.ndarray:
    return values.cpu().numpy()
