"""What a model learns from normal images without gradients: statistics, memory items, and the scale of its maps."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from bkd_fast.model.alignment import PreparedLevel
from bkd_fast.model.bkd import BKD
from bkd_fast.model.memory import SparseMemory
from bkd_fast.ops import cosine_anomaly_map

CANDIDATES = 20_000  # features a level that the coreset is chosen from


@torch.no_grad()
def calibrate(model: BKD, batches: Iterable[Tensor], count: int, generator: torch.Generator) -> None:
    """Sets the scale of the teacher's channels and the memory's first items, as the configuration asks.

    Args:
        batches: normal images (N, 3, H, W) in [0, 1] on the model's device, each once.
        count: how many images there are in all.
        generator: on the CPU; draws the candidate features.
    """
    config = model.config
    coreset = config.reverse_branch and config.memory_items > 0 and config.memory_init == "coreset"
    if not (config.scale_channels or coreset):
        return
    levels = len(model.teacher.channels)
    sums = [torch.zeros(2, width, dtype=torch.float64) for width in model.teacher.channels]
    pixels = [0] * levels
    candidates: list[list[Tensor]] = [[] for _ in range(levels)]
    for images in batches:
        for level, features in enumerate(model.teacher(images)):
            rows = features.permute(0, 2, 3, 1).flatten(1, 2)  # (N, H * W, C)
            wide = rows.double().flatten(0, 1)
            sums[level] += torch.stack([wide.sum(0), wide.square().sum(0)]).cpu()
            pixels[level] += wide.shape[0]
            share = min(rows.shape[1], -(-CANDIDATES // count))
            for image in rows:
                chosen = torch.randperm(image.shape[0], generator=generator)[:share]
                candidates[level].append(image[chosen.to(image.device)])
    for level in range(levels):
        mean, square = (sums[level] / pixels[level]).unbind()
        deviation = (square - mean.square()).clamp_min(0).sqrt()
        features = torch.cat(candidates[level])
        if config.scale_channels:
            model.teacher.set_deviation(level + 1, deviation.float())
            features = features / model.teacher.deviation(level + 1).flatten()
        if coreset:
            memory = model.memories[level]
            assert isinstance(memory, SparseMemory)
            items = memory.items
            chosen = greedy_coreset(features, items.shape[0])
            # With fewer features than items the remaining items keep their random start.
            items[: len(chosen)] = features[chosen]


def greedy_coreset(features: Tensor, count: int) -> Tensor:
    """Indices of ``count`` rows, each the farthest from those before it (k-centre greedy, as in PatchCore).

    Rare normal features are kept this way, where random rows or k-means favour the common ones.

    Args:
        features: (R, C).

    Returns:
        (min(count, R),) int64; the first is the row closest to the mean.
    """
    chosen = [int((features - features.mean(0)).square().sum(1).argmin())]
    distance = (features - features[chosen[0]]).square().sum(1)
    while len(chosen) < min(count, len(features)):
        chosen.append(int(distance.argmax()))
        distance = torch.minimum(distance, (features - features[chosen[-1]]).square().sum(1))
    return torch.tensor(chosen, device=features.device)


@torch.no_grad()
def map_scales(model: BKD, batches: Iterable[Tensor], prepared: list[PreparedLevel]) -> dict[str, list[float]]:
    """Mean distance of every branch and level over normal images: what ``model.map_scale`` divides by.

    Without it the branch that rebuilds worse would drown the other, whichever of them sees the defect.
    """
    totals: dict[str, list[float]] = {branch: [0.0] * len(model.teacher.channels) for branch in model.branches()}
    count = 0
    for images in batches:
        result = model.distill(model.teacher(images), prepared)
        count += len(images)
        for branch, outputs in (("forward", result.aligned), ("reverse", result.student)):
            for level, output in enumerate(outputs):
                target = result.teacher[level]
                distance = cosine_anomaly_map(
                    [target], [output], target.shape[-2:], sigma=0.0, value_share=model.config.map_value_share
                )
                totals[branch][level] += float(distance.double().mean((1, 2)).sum())
    return {branch: [max(total / count, 1e-12) for total in values] for branch, values in totals.items()}
