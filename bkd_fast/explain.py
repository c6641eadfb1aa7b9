"""Why a detector judges an image as it does: what each level, branch and part makes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bkd_fast.detector import Detector
from bkd_fast.inputs import Decoded, ImageLike
from bkd_fast.model.lifting import lifted
from bkd_fast.model.memory import SparseMemory
from bkd_fast.model.teacher import STRIDES


@dataclass(frozen=True)
class Explanation:
    """What happens to one image inside a model; per level from fine to coarse, each at its own size (h_l, w_l).

    Attributes:
        distances: branch -> stride -> smoothed distance from the query at the network's size (H, W), in units of its
            mean over held-out normals where the model knows that (``fusion="geometric"``).
        offsets: stride -> (2, h, w), the mean over shots and taps of how far the support is fetched from, down and to
            the right, in pixels of the network's image.
        unaligned, aligned: stride -> (h, w), distance (Eq. 13) of the support from the query as it is looked up or
            drawn, and as it is warped.
        kept: stride -> (h, w), how many memory items each feature is read from.
        strongest: stride -> (h, w), the index of the item that counts most; -1 where none does.
        weight: stride -> (h, w), that item's weight.
    """

    distances: Mapping[str, Mapping[int, np.ndarray]]
    offsets: Mapping[int, np.ndarray]
    unaligned: Mapping[int, np.ndarray]
    aligned: Mapping[int, np.ndarray]
    kept: Mapping[int, np.ndarray]
    strongest: Mapping[int, np.ndarray]
    weight: Mapping[int, np.ndarray]


@torch.inference_mode()
def explain(detector: Detector, image: ImageLike) -> Explanation:
    """Looks into ``detector`` while it judges ``image``; parts that its model lacks are empty mappings.

    Args:
        image: see :meth:`bkd_fast.Detector.__call__`.

    Raises:
        BKDError: not an image.
    """
    model, size = detector.model, detector.config.image_size
    result = detector.distill(Decoded(image).fitted(size).unsqueeze(0))
    distances = {
        branch: {
            stride: _array(level[0]) / scale
            for stride, level, scale in zip(STRIDES[-len(maps) :], maps, model.map_scale[branch], strict=True)
        }
        for branch, maps in model.level_maps(result, size).items()
    }
    strides = STRIDES[-len(result.aligned) :] if result.aligned else ()
    query = result.teacher[-len(strides) :] if strides else []
    unaligned = model.support_of(result.teacher, detector.prepared) if strides else []
    kept, strongest, weight = {}, {}, {}
    if "reverse" in distances and detector.config.memory_items:
        for stride, memory, level in zip(STRIDES, model.memories, result.teacher, strict=True):
            assert isinstance(memory, SparseMemory)
            weights = memory.attention(level)[0]
            largest, item = weights.max(-1)
            kept[stride] = _array((weights > 0).sum(-1))
            strongest[stride] = _array(torch.where(largest > 0, item, -1))
            weight[stride] = _array(largest)
    return Explanation(
        distances=distances,
        offsets={
            stride: stride * _array(_mean_offset(offset))
            for stride, offset in zip(STRIDES[-len(result.offsets) :], result.offsets, strict=False)
        },
        unaligned=_distances(strides, query, unaligned, detector.config.lift),
        aligned=_distances(strides, query, result.aligned, detector.config.lift),
        kept=kept,
        strongest=strongest,
        weight=weight,
    )


def _mean_offset(offset: Tensor) -> Tensor:
    """(k, 2T, h, w) -> (2, h, w): down, right."""
    return offset.unflatten(1, (-1, 2)).mean((0, 1))


def _distances(
    strides: Sequence[int], query: Sequence[Tensor], support: Sequence[Tensor], lift: float
) -> dict[int, np.ndarray]:
    pairs = zip(lifted(query, lift), lifted(support, lift), strict=True)
    return {
        stride: _array(1 - torch.cosine_similarity(q, s, dim=1)[0])
        for stride, (q, s) in zip(strides, pairs, strict=True)
    }


def _array(values: Tensor) -> np.ndarray:
    return values.cpu().numpy()
