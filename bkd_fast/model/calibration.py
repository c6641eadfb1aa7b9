"""What a model learns from normal images without gradients: statistics, memory items, and the scale of its maps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from bkd_fast.config import RetrievedSupport
from bkd_fast.model.bkd import BKD, Distillation, cells
from bkd_fast.model.memory import SparseMemory
from bkd_fast.model.support import describe, shrink

CANDIDATES = 200_000  # features that a memory's coreset is chosen from
PROJECTED = 64  # dimensions that distances are compared in
Regions: TypeAlias = Callable[[Sequence[int]], Tensor | None]


def whole(indices: Sequence[int]) -> None:
    """Return what of images is looked at, where no image has a region of its own: None."""


@torch.no_grad()
def learn_normal(
    model: BKD,
    levels: Iterable[list[Tensor]],
    count: int,
    generator: torch.Generator | None,
    regions: Regions = whole,
    groups: Sequence[int] | None = None,
) -> list[int]:
    """Learn what one pass over the normal images tells, before any training.

    Args:
        levels: raw teacher levels (1, C_l, H_l, W_l) of each image, in order; used up.
        count: how many there are.
        generator: see :func:`calibrate`; None where the model has its statistics and memory from a checkpoint.
        regions: see :func:`calibrate`.
        groups: the category of each image; each gets the same share of bank and memory. None: one category.

    Returns:
        The images of the support bank, by index; empty where supports are sampled.
    """
    shrunk: list[Tensor] = []  # the deepest level of every image, as small as descriptors are

    def seen() -> Iterator[list[Tensor]]:
        for image in levels:
            if model.config.retrieves:
                shrunk.append(shrink(image[-1]))
            yield image

    passing = seen()
    if generator is not None:
        calibrate(model, passing, count, generator, regions, groups)
    for _ in passing:
        pass
    support = model.config.support
    if not isinstance(support, RetrievedSupport):
        return []
    # The mean of standardised features is the standardised mean.
    deepest = len(model.teacher.channels)
    mean, std = (model.teacher.get_buffer(f"{name}_{deepest}") for name in ("mean", "std"))
    return choose_bank(((level - mean) / std for level in shrunk), support.bank_size, groups)


@torch.no_grad()
def calibrate(
    model: BKD,
    batches: Iterable[list[Tensor]],
    count: int,
    generator: torch.Generator,
    regions: Regions = whole,
    groups: Sequence[int] | None = None,
) -> None:
    """Set the teacher's statistics and the memory's first items, as the configuration asks.

    Args:
        batches: raw teacher levels (N, C_l, H_l, W_l) of normal images, each once.
        count: how many images there are in all.
        generator: on the CPU; draws the candidate features.
        regions: gives for indices of images what of each is looked at, (N, H, W) bool, or None: of all what the model
            says (:meth:`BKD.set_roi`).
        groups: see :func:`learn_normal`.
    """
    config, teacher = model.config, model.teacher
    coreset = config.memory is not None and config.memory.init == "coreset"
    if config.teacher.scale == "none" and not coreset:
        return
    sums = [torch.zeros(2, width, dtype=torch.float64) for width in teacher.channels]
    pixels = [0] * len(sums)
    candidates: list[list[Tensor]] = []  # per image the rows of every view
    origins: list[int] = []
    seen = 0
    for levels in batches:
        region = _region(model, regions, range(seen, seen + len(levels[0])))
        for level, features in enumerate(levels):
            wide = features.permute(0, 2, 3, 1)
            inside = None if region is None else cells(region, features.shape[2:])[:, 0].expand(wide.shape[:3])
            wide = (wide.flatten(0, 2) if inside is None else wide[inside.to(wide.device)]).double()
            sums[level] += torch.stack([wide.sum(0), wide.square().sum(0)]).cpu()
            pixels[level] += wide.shape[0]
        if coreset:
            for index in range(len(levels[0])):
                views = model.views([level[index : index + 1] for level in levels])[-len(model.memories) :]
                own = None if region is None else region[index : index + 1] if len(region) > 1 else region
                candidates.append([_sampled(view, -(-CANDIDATES // count), generator, own) for view in views])
                origins.append(seen + index)
        seen += len(levels[0])
    channels = config.teacher.scale == "channel"
    for level, total in enumerate(sums, start=1):
        mean, square = (total / pixels[level - 1]).unbind()
        std = (square - mean.square()).clamp_min(0).sqrt()
        if config.teacher.scale != "none":
            teacher.set_statistics(
                # One std for all channels is the root of their mean square.
                level,
                mean.float(),
                (std if channels else std.square().mean().sqrt().expand(len(std))).float(),
            )
    if not coreset:
        return
    shift, scale = _statistics(model)
    for index, memory in enumerate(model.memories):
        assert isinstance(memory, SparseMemory)
        rows = torch.cat([image[index] for image in candidates])
        rows = (rows - shift[index].to(rows.device)) / scale[index].to(rows.device)
        origin = torch.tensor(origins).repeat_interleave(torch.tensor([len(image[index]) for image in candidates]))
        chosen = shared_coreset(rows, memory.items.shape[0], None if groups is None else torch.tensor(groups)[origin])
        # With fewer features than items the remaining items keep their random start.
        memory.items[: len(chosen)] = rows[chosen]
        memory.get_buffer("origin")[: len(chosen)] = origin.to(chosen.device)[chosen]


@torch.no_grad()
def learn_more(
    model: BKD,
    deepest: Tensor | None,
    shown: int,
    levels: Iterable[list[Tensor]],
    count: int,
    known: int,
    generator: torch.Generator,
    regions: Regions = whole,
) -> list[int]:
    """Take further normal images into the memory and the support, without training.

    The memory's items become a coreset of its items and of features of the new images, and a support bank those of its
    images and the new ones that differ most; a sampled support is drawn again from all images. Statistics, and items
    and weights that were learned, stay.

    Args:
        deepest: the supports' deepest level (k, C, H, W), standardised; None where queries retrieve none.
        shown: k, also of a model without supports, whose run shows images nevertheless.
        levels: standardised levels (1, C_l, H_l, W_l) of each new image, in order.
        count: how many new images there are.
        known: how many images were learned from before; new ones are counted from there.
        generator: on the CPU; draws the candidate features and the supports.
        regions: of the new images, see :func:`calibrate`.

    Returns:
        The images to keep as support, ascending: below k a former one, from k on a new one.
    """
    config = model.config
    grows = takes_items(model)
    descriptors = [] if deepest is None else [deepest]
    candidates: list[list[Tensor]] = []  # per image the rows of every view
    for index, image in enumerate(levels):
        if grows:
            views = model.views(image)[-len(model.memories) :]
            region = _region(model, regions, [index])
            candidates.append([_sampled(view, -(-CANDIDATES // count), generator, region) for view in views])
        if deepest is not None:
            descriptors.append(shrink(image[-1].float()).to(deepest.device))
    for index, memory in enumerate(model.memories if grows else ()):
        assert isinstance(memory, SparseMemory)
        origin = memory.get_buffer("origin")
        former = origin >= 0  # the others are where they began at random
        fresh = [image[index] for image in candidates]
        rows = torch.cat([memory.items[former], *(row.float() for row in fresh)])
        of = torch.arange(known, known + count).repeat_interleave(torch.tensor([len(row) for row in fresh]))
        origins = torch.cat([origin[former], of.to(origin.device)])
        chosen = greedy_coreset(rows, len(memory.items))
        memory.items[: len(chosen)], origin[: len(chosen)] = rows[chosen], origins[chosen]
    if isinstance(config.support, RetrievedSupport):
        return choose_bank(descriptors, config.support.bank_size)
    keep = shown if config.support is None else min(config.support.shots, known + count)
    drawn = torch.randperm(known + count, generator=generator)[:keep].tolist()
    fresh_images = sorted(shown + image - known for image in drawn if image >= known)
    return [*range(keep - len(fresh_images)), *fresh_images]


def takes_items(model: BKD) -> bool:
    """Return whether the memory's items are normal features, which others can join."""
    memory = model.config.memory
    return memory is not None and memory.init == "coreset" and not memory.learned


def _region(model: BKD, regions: Regions, indices: Sequence[int]) -> Tensor | None:
    """Return what of images is looked at, (N or 1, H, W) bool; None: everything."""
    region = regions(indices)
    return model.roi if region is None else region


def _sampled(view: Tensor, limit: int, generator: torch.Generator, region: Tensor | None) -> Tensor:
    """At most ``limit`` of the features of a view (1, C, H, W) that show any of a region (1, H, W), as rows."""
    rows = view[0].flatten(1).T
    if region is not None:
        rows = rows[cells(region, view.shape[2:]).flatten().to(rows.device)]
    chosen = torch.randperm(len(rows), generator=generator)[:limit]
    return rows[chosen.to(rows.device)].half()


def _statistics(model: BKD) -> tuple[list[Tensor], list[Tensor]]:
    """Mean and std (C,) of the features that each memory holds: views are linear in the levels."""
    levels = range(1, len(model.teacher.channels) + 1)
    means = [model.teacher.get_buffer(f"mean_{level}") for level in levels]
    stds = [model.teacher.get_buffer(f"std_{level}") for level in levels]
    count = len(model.memories)
    # A constant image of the smallest size that all levels have.
    grid = [-(-model.teacher.strides[-1] // stride) for stride in model.teacher.strides]
    shift = model.views([mean.expand(-1, -1, side, side) for mean, side in zip(means, grid, strict=True)])[-count:]
    if model.config.teacher.levels == "separate":
        return [view[0, :, 0, 0] for view in shift], [std.flatten() for std in stds]
    return [view[0, :, 0, 0] for view in shift], [torch.cat([std.flatten() for std in stds])]


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
        # Distances survive a random projection (Johnson-Lindenstrauss); PatchCore chooses its coreset in one too.
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


def shared_coreset(features: Tensor, count: int, groups: Tensor | None) -> Tensor:
    """Return the rows of :func:`greedy_coreset` of each group, about ``count`` over the number of groups.

    Args:
        groups: (R,) int64; None: one group.
    """
    if groups is None:
        return greedy_coreset(features, count)
    numbers = groups.unique().tolist()
    parts = []
    for index, number in enumerate(numbers):
        rows = (groups == number).nonzero().flatten().to(features.device)
        share = count * (index + 1) // len(numbers) - count * index // len(numbers)
        parts.append(rows[greedy_coreset(features[rows], share)])
    return torch.cat(parts)


@torch.no_grad()
def scale_maps(model: BKD, results: Iterable[Distillation]) -> None:
    """Set ``model.map_scale``, the mean distance of each branch and view, from normal images not trained on."""
    sums = {branch: torch.zeros(len(scales), dtype=torch.float64) for branch, scales in model.map_scale.items()}
    images = 0
    for result in results:
        maps_of = model.level_maps(result, model.config.teacher.size)
        images += len(result.teacher[0])
        share = 1.0 if result.region is None else result.region.double().mean((1, 2))
        for branch, maps in maps_of.items():
            sums[branch] += torch.stack([(level.double().mean((1, 2)) / share).sum().cpu() for level in maps])
    model.map_scale = {branch: (total / images).clamp_min(1e-12).tolist() for branch, total in sums.items()}


@torch.no_grad()
def choose_bank(levels: Iterable[Tensor], count: int, groups: Sequence[int] | None = None) -> list[int]:
    """Which normal images to keep as support: those that differ most from each other, in order of the images.

    Args:
        levels: the deepest level of each image, (N, C, H, W) a batch.
        count: how many, where there are as many.
        groups: see :func:`learn_normal`.
    """
    descriptors = torch.cat([describe(level.float()) for level in levels])
    return sorted(shared_coreset(descriptors, count, None if groups is None else torch.tensor(groups)).tolist())


LEVEL_STATISTICS = ("mean", "std", "offset", "row", "column")


@torch.no_grad()
def level_statistics(levels: Iterable[Tensor]) -> Tensor:
    """Return five numbers of each level of an image, by which a change of camera or light shows: (N, 5 L) float32.

    In order of LEVEL_STATISTICS, L times: mean and std of the features; root mean square of the channels' means; and
    the centre of the features' squares, down and to the right, from 0 to 1.

    Args:
        levels: standardised teacher levels (N, C_l, H_l, W_l).
    """
    parts: list[Tensor] = []
    for level in levels:
        features = level.float()
        energy = features.square().mean(1)
        total = energy.sum((1, 2)).clamp_min(1e-12)
        rows, columns = (
            (torch.arange(count, device=energy.device) + 0.5) / count for count in (energy.shape[1], energy.shape[2])
        )
        parts += [
            features.mean((1, 2, 3)),
            features.flatten(1).std(1, unbiased=False),
            features.mean((2, 3)).square().mean(1).sqrt(),
            (energy.sum(2) * rows).sum(1) / total,
            (energy.sum(1) * columns).sum(1) / total,
        ]
    return torch.stack(parts, 1)


def statistics_of(images: Tensor) -> dict[str, list[float]]:
    """Return mean and std over images of each of :func:`level_statistics` (N, 5 L), by names as ``level 1 mean``."""
    wide = images.double()
    std = wide.std(0) if len(wide) > 1 else torch.zeros_like(wide[0])
    count = len(LEVEL_STATISTICS)
    names = [f"level {index // count + 1} {LEVEL_STATISTICS[index % count]}" for index in range(wide.shape[1])]
    return dict(zip(names, torch.stack([wide.mean(0), std], 1).tolist(), strict=True))
