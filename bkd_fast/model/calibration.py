"""What a model learns from normal images without gradients: statistics, memory items, and the scale of its maps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from bkd_fast.model.bkd import BKD, Prepared
from bkd_fast.model.memory import SparseMemory
from bkd_fast.model.retrieval import describe, shrink

CANDIDATES = 100_000  # features a level that the coreset is chosen from
PROJECTED = 64  # dimensions that distances are compared in


@torch.no_grad()
def learn_normal(
    model: BKD, levels: Iterable[list[Tensor]], count: int, generator: torch.Generator | None
) -> list[int]:
    """What is learned in one pass over the normal images, before any training.

    Args:
        levels: raw teacher levels (1, C_l, H_l, W_l) of each image, in order; used up.
        count: how many there are.
        generator: see :func:`calibrate`; None where the model has its statistics and memory from a checkpoint.

    Returns:
        The images that queries look up their support among; empty where supports are drawn.
    """
    shrunk: list[Tensor] = []  # the deepest level of every image, as small as descriptors are

    def seen() -> Iterator[list[Tensor]]:
        for found in levels:
            if model.config.looks_up:
                shrunk.append(shrink(found[-1]))
            yield found

    passing = seen()
    if generator is not None:
        calibrate(model, passing, count, generator)
    for _ in passing:
        pass
    if not model.config.looks_up:
        return []
    deepest = (model.teacher.standardized(level, len(model.teacher.channels)) for level in shrunk)
    return choose_pool(deepest, model.config.support_pool)


@torch.no_grad()
def calibrate(model: BKD, batches: Iterable[list[Tensor]], count: int, generator: torch.Generator) -> None:
    """Sets the scale of the teacher's channels and the memory's first items, as the configuration asks.

    Args:
        batches: raw teacher levels (N, C_l, H_l, W_l) of normal images, each once.
        count: how many images there are in all.
        generator: on the CPU; draws the candidate features.
    """
    config = model.config
    coreset = config.reverse_branch and config.memory_items > 0 and config.memory_init == "coreset"
    if not (config.standardize or coreset):
        return
    levels = len(model.teacher.channels)
    sums = [torch.zeros(2, width, dtype=torch.float64) for width in model.teacher.channels]
    pixels = [0] * levels
    candidates: list[list[Tensor]] = [[] for _ in range(levels)]
    for features_of_levels in batches:
        for level, features in enumerate(features_of_levels):
            rows = features.permute(0, 2, 3, 1).flatten(1, 2)  # (N, H * W, C)
            wide = rows.double().flatten(0, 1)
            sums[level] += torch.stack([wide.sum(0), wide.square().sum(0)]).cpu()
            pixels[level] += wide.shape[0]
            share = min(rows.shape[1], -(-CANDIDATES // count))
            for image in rows if coreset else ():
                chosen = torch.randperm(image.shape[0], generator=generator)[:share]
                candidates[level].append(image[chosen.to(image.device)])
    for level in range(levels):
        mean, square = (sums[level] / pixels[level]).unbind()
        deviation = (square - mean.square()).clamp_min(0).sqrt()
        if config.standardize:
            model.teacher.set_statistics(level + 1, mean.float(), deviation.float())
        if coreset:
            features = torch.cat(candidates[level])
            if config.standardize:
                features = model.teacher.standardized(features[:, :, None, None], level + 1).flatten(1)
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
    wide = features.shape[1]
    if wide > PROJECTED:
        # Distances survive a random projection (Johnson-Lindenstrauss); PatchCore's coreset is found in one too.
        directions = torch.randn(wide, PROJECTED, generator=torch.Generator().manual_seed(0)) / PROJECTED**0.5
        features = features @ directions.to(features.device)
    squares = features.square().sum(1)

    def squared_distance(row: int) -> Tensor:
        return torch.addmv(squares + squares[row], features, features[row], alpha=-2)

    chosen = [int((features - features.mean(0)).square().sum(1).argmin())]
    distance = squared_distance(chosen[0])
    while len(chosen) < min(count, len(features)):
        distance[chosen[-1]] = -1  # rounding must not bring it back
        chosen.append(int(distance.argmax()))
        distance = torch.minimum(distance, squared_distance(chosen[-1]))
    return torch.tensor(chosen, device=features.device)


@torch.no_grad()
def balance_maps(model: BKD, batches: Iterable[Tensor], prepared: Prepared) -> None:
    """Sets ``model.map_scale`` and ``model.map_exponent`` from normal images that were not trained on.

    The smoothed distances of each branch and level, of which the map takes the geometric mean, are divided by their own
    geometric mean and raised to the share of the level that their branch deserves: as its precision there, one over
    the squared mean distance from normal features, is to the other branch's. Supports come close where parts lie alike,
    the memory where surfaces do.

    Args:
        batches: normal images (N, 3, H, W) on the model's device.
    """
    sums = {branch: torch.zeros(2, len(scales), dtype=torch.float64) for branch, scales in model.map_scale.items()}
    pixels = 0
    for images in batches:
        found = model.level_maps(model.distill(model.teacher(images), prepared), model.config.image_size)
        pixels += next(iter(found.values()))[0].numel()
        for branch, maps in found.items():
            for level, distance in enumerate(maps):
                logarithm = distance.double().clamp_min(1e-6).log()
                sums[branch][:, level] += torch.stack([logarithm.sum(), distance.double().sum()]).cpu()
    precision = {branch: (pixels / total[1].clamp_min(1e-12)).square() for branch, total in sums.items()}
    shared = -min(len(levels) for levels in precision.values())
    together = torch.stack([levels[shared:] for levels in precision.values()]).sum(0)
    for branch, (logarithms, _) in sums.items():
        share = precision[branch][shared:] / together
        # A level that the other branch leaves out counts as much as the levels they share do in the mean.
        alone = share.mean().expand(len(logarithms) + shared)
        share = torch.cat([alone, share])
        model.map_scale[branch] = (logarithms / pixels).exp().tolist()
        model.map_exponent[branch] = share.tolist()


@torch.no_grad()
def choose_pool(levels: Iterable[Tensor], count: int) -> list[int]:
    """Which normal images to keep as support: those that differ most from each other, in order of the images.

    Args:
        levels: the deepest level of each image, (N, C, H, W) a batch.
        count: how many, where there are as many.
    """
    descriptors = torch.cat([describe(level.float()) for level in levels])
    return sorted(greedy_coreset(descriptors, count).tolist())
