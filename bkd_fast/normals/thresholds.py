"""What normal images say of a trained model: the scale of its maps, and the scores that thresholds come from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from bkd_fast.artifact import Calibration, Unified
from bkd_fast.decisions import NormalScores
from bkd_fast.errors import BKDError
from bkd_fast.model import BKD
from bkd_fast.model.bkd import SCORES
from bkd_fast.model.calibration import level_statistics, scale_maps, statistics_of, whole
from bkd_fast.model.memory import SparseMemory
from bkd_fast.model.support import Exclude, Support, SupportBank, describe

BATCH = 8
# Images closer than this share of the median squared distance between nearest images show one part.
DUPLICATE = 0.01


class Batch(NamedTuple):
    """Levels of some images, what they must not be compared with, and what of each is looked at."""

    levels: list[Tensor]
    exclude: Exclude | None
    region: Tensor | None


class Normals(Protocol):
    """Normal images or their tiles by number, as the teacher sees them. ``image_of``: which image each shows.

    It may have a method ``regions`` as :class:`bkd_fast.normals.features.FeatureSource`, where images differ in what is
    looked at.
    """

    @property
    def image_of(self) -> Sequence[int]:
        """The image index of each item."""

    def __len__(self) -> int: ...

    def levels(self, indices: Sequence[int]) -> list[Tensor]:
        """Return the standardised teacher levels (N, C_l, H_l, W_l) of some images."""


@dataclass(frozen=True)
class Measured:
    """Scores of normal images, the median pixel of their maps, and how many of them are near duplicates.

    ``teacher``: :func:`bkd_fast.model.calibration.statistics_of` these images. ``images``: which image each score is
    of; the validation images come first, then the training images. ``raw``: what the scores are made of.
    """

    scores: NormalScores
    normal_level: float
    duplicates: int
    teacher: dict[str, list[float]]
    images: list[int]
    raw: Raw = field(repr=False, compare=False)


class Raw(NamedTuple):
    """Of N images or tiles, what their scores are made of.

    ``maps``: see :class:`_Parts`. ``distance`` (N,): of whole images, None where there is none. ``expected`` (N, 2):
    what is taken off the logarithms of both, None where supports are not retrieved. ``logarithms`` (1 or 2, N): what
    is left of them, float64.
    """

    maps: Tensor
    distance: Tensor | None
    expected: Tensor | None
    logarithms: Tensor


@torch.no_grad()
def measure_normals(
    model: BKD,
    support: Support,
    train: Normals,
    validation: Normals,
    bank: Sequence[int],
    *,
    origin: Tensor | None = None,
    rescale: bool = True,
) -> Measured:
    """Score normal images, and set the scale of the model's maps from those that were not trained on.

    Training images are scored without themselves and their near duplicates among supports and memory items, where
    these can be left out and something remains to compare with; otherwise validation images alone are.

    Args:
        support: of :meth:`BKD.make_support`.
        bank: the training images that are the support bank, -1 for one that is not among them; empty where supports
            are sampled.
        origin: the same of each memory item; None: what the memory says.
        rescale: False keeps the scales of maps and scores that the model has.
    """
    if rescale:
        scale_maps(model, (model.distill(each.levels, support, region=each.region) for each in _batches(validation)))
    parts = [_scored(model, _batches(validation), support)] if len(validation) else []
    images = list(validation.image_of)
    source, duplicates, rows = "validation", 0, list[int]()
    if can_leave_out(model):
        descriptors = torch.cat([describe(each.levels[-1].float()) for each in _batches(train)])
        own = torch.tensor(train.image_of, device=descriptors.device)
        itself = own.unsqueeze(1) == own  # all tiles of an image
        same = itself | near_duplicates(descriptors)
        duplicates = int((same & ~itself).any(1).sum())
        hidden = _hidden(model, same, bank, origin)
        shots = model.config.support.shots if model.config.support is not None else 0
        rows = _comparable(model, hidden, len(train))
        if rows:
            parts.append(_scored(model, _left_out(train, rows, hidden, shots), support))
            source = "leave-one-out"
            first = max(images, default=-1) + 1
            images += [first + train.image_of[row] for row in rows]
    if not parts:
        raise BKDError("there are no images to take thresholds from: give at least two")
    maps, distances = (torch.cat([getattr(part, name) for part in parts]) for name in ("maps", "images"))
    distance = distances if len(distances) else None
    measured = [maps[:, 0]] if distance is None else [maps[:, 0], distance]
    logarithms = torch.stack(measured).double().clamp_min(1e-12).log()
    expected = None
    if isinstance(support, SupportBank):
        scored = {row: len(validation) + index for index, row in enumerate(rows)}
        retrieved = [shots for part in parts for shots in part.shots]
        expected = _measure_supports(model, logarithms.T, [scored.get(row) for row in bank], retrieved)
        logarithms = logarithms - expected.T
    if rescale:
        model.score_scale.update(_scales(logarithms))
    scores = model.score_of(maps[:, 0], distance, expected)
    normal = NormalScores(
        source, _by_image(scores, images, model.tiles_score), _by_image(maps[:, 1], images, torch.amax)
    )
    teacher = _means(torch.cat([part.teacher for part in parts]), images)
    raw = Raw(maps, distance, expected, logarithms)
    level = float(maps[:, 2].median())
    return Measured(normal, level, duplicates, statistics_of(teacher), sorted(set(images)), raw)


def measure_categories(
    model: BKD, measured: Measured, labels: Sequence[int], names: Sequence[str], bank: Sequence[int], rate: float
) -> tuple[Calibration, Unified]:
    """Return the thresholds of each category of a model that is trained on several.

    Args:
        measured: of whole images, not tiles.
        labels: the category of each validation image, then of each training image.
        bank: the category of each support.
        rate: of false alarms.

    Returns:
        The calibration of all images together, each scored on the scale of its category; and of each category.
    """
    maps, distance, expected, logarithms = measured.raw
    own = torch.tensor(labels)[measured.images]
    scales, calibrations = [], []
    for number in range(len(names)):
        rows = (own == number).nonzero().flatten()
        scales.append(_scales(logarithms[:, rows]))
        whole_image, offsets = (None if values is None else values[rows] for values in (distance, expected))
        scores = model.score_of(maps[rows, 0], whole_image, offsets, scales[-1]).tolist()
        normal = NormalScores(measured.scores.source, scores, maps[rows, 1].tolist())
        calibrations.append(Calibration.of(normal, float(maps[rows, 2].median()), rate))
    pooled = NormalScores(
        measured.scores.source,
        [score for one in calibrations for score in one.scores],
        [value for one in calibrations for value in one.maxima],
    )
    together = Calibration.of(pooled, measured.normal_level, rate, measured.teacher)
    return together, Unified(list(names), list(bank), scales, calibrations)


def _scales(logarithms: Tensor) -> dict[str, list[float]]:
    """Return mean and std of the logarithms (1 or 2, N) that image scores combine."""
    # Of one image there is no std, and of equal ones none to divide by.
    return {
        name: [float(logarithm.mean()), max(float(logarithm.std(unbiased=False)), 0.01)]
        for name, logarithm in zip(SCORES, logarithms, strict=False)
    }


@torch.no_grad()
def image_scores(model: BKD, support: Support, normals: Normals) -> list[float]:
    """Return the score of each image as the model is, nothing left out."""
    scores = []
    for levels, _, region in _batches(normals):
        result = model.distill(levels, support, region=region)
        maps = model.anomaly_map(result, model.config.teacher.size)
        scores.append(model.image_score(maps, result.image, result.expected, region).cpu())
    return _by_image(torch.cat(scores), normals.image_of, model.tiles_score)


def _measure_supports(
    model: BKD, logarithms: Tensor, scored: Sequence[int | None], retrieved: Sequence[Tensor]
) -> Tensor:
    """Set the model's ``support_excess``, and return what is expected of the normal images (N, 2).

    Args:
        logarithms: of the images' distances, (N, 2).
        scored: which of them each image of the support bank is; None: it was not scored without itself.
        retrieved: which images of the bank each image retrieved.
    """
    excess = model.get_buffer("support_excess")
    mean = logarithms.mean(0)
    excess.zero_()
    for position, row in enumerate(scored):
        if row is not None:
            excess[position] = logarithms[row] - mean
    expected = model.config.anomaly_map.relative * excess.cpu()
    return torch.stack([expected[shots].mean(0) for shots in retrieved])


def _by_image(values: Tensor, images: Sequence[int], combine: Callable[[Tensor], Tensor]) -> list[float]:
    """One value for each image, of its tiles' values; images in order of their numbers."""
    order = sorted(range(len(images)), key=images.__getitem__)
    tiles = (list(rows) for _, rows in groupby(order, key=images.__getitem__))
    return [float(combine(values[rows])) for rows in tiles]


def _means(values: Tensor, images: Sequence[int]) -> Tensor:
    """The mean row of each image, which may have several tiles."""
    _, index, count = torch.tensor(images).unique(return_inverse=True, return_counts=True)
    total = torch.zeros(len(count), values.shape[1], dtype=torch.float64)
    return total.index_add(0, index, values.double()) / count.unsqueeze(1)


def can_leave_out(model: BKD) -> bool:
    """Return whether a training image's own features can be left out of everything that it is compared with."""
    config = model.config
    forward = not config.forward_branch or config.retrieves
    memory = config.memory is not None and config.memory.read == "neighbors" and not config.memory.learned
    reverse = memory and config.student is None and len(model.memories) == 1
    return forward and (reverse or not config.reverse_branch)


def near_duplicates(descriptors: Tensor) -> Tensor:
    """Return which of the images with ``descriptors`` (N, D) show the same part: (N, N) bool, each with itself."""
    squares = descriptors.square().sum(1)
    distance = (squares.unsqueeze(1) + squares - 2 * descriptors @ descriptors.T).clamp_min(0)
    itself = torch.eye(len(descriptors), dtype=torch.bool, device=descriptors.device)
    if len(descriptors) < 3:
        return itself
    nearest = distance.masked_fill(itself, torch.inf).amin(1)
    return itself | (distance < DUPLICATE * nearest.median())


def _hidden(model: BKD, same: Tensor, bank: Sequence[int], origin: Tensor | None) -> Exclude:
    """The supports and items that show the part that a training image shows, for all of them."""
    supports = _columns(same, torch.tensor(bank, device=same.device)) if bank else None
    if not model.config.reverse_branch:
        return Exclude(supports, None)
    origin = model.memories[0].get_buffer("origin") if origin is None else origin.to(same.device)
    return Exclude(supports, _columns(same, origin))


def _columns(same: Tensor, images: Tensor) -> Tensor:
    """Return the columns of ``same`` for ``images``; what is of no image (-1) is nobody's own."""
    return same[:, images.clamp_min(0)] & (images >= 0)


def _comparable(model: BKD, hidden: Exclude, count: int) -> list[int]:
    """Which of the training images keep a support, and as many items as a feature is read from."""
    kept = torch.ones(count, dtype=torch.bool)
    if hidden.supports is not None:
        kept &= (~hidden.supports).any(1).cpu()
    if hidden.items is not None:
        memory = model.memories[0]
        assert isinstance(memory, SparseMemory)
        kept &= ((~hidden.items).sum(1) >= memory.neighbors).cpu()
    return kept.nonzero().flatten().tolist()


def _left_out(source: Normals, rows: Sequence[int], hidden: Exclude, shots: int) -> Iterator[Batch]:
    left = dict.fromkeys(rows, 0)
    if hidden.supports is not None:
        left = {row: min(shots, int((~hidden.supports[row]).sum())) for row in rows}
    # Images of a batch choose as many supports each: those that may choose fewer go apart.
    for _, group in groupby(rows, lambda row: left[row]):
        alike = list(group)
        for start in range(0, len(alike), BATCH):
            part = alike[start : start + BATCH]
            yield _batch(source, part, Exclude(*(None if one is None else one[part] for one in hidden)))


class _Parts(NamedTuple):
    """``maps`` (N, 3): top mean, maximum and median of each map. ``images`` (N,) or (0,): whole images' distances.

    ``teacher`` (N, 5 L): see :func:`bkd_fast.model.calibration.level_statistics`. ``shots``: of each image, the indices
    of the supports that it retrieves.
    """

    maps: Tensor
    images: Tensor
    teacher: Tensor
    shots: list[Tensor]


def _scored(model: BKD, batches: Iterable[Batch], support: Support) -> _Parts:
    maps, images, teacher, shots = [], [], [], list[Tensor]()
    for levels, exclude, region in batches:
        result = model.distill(levels, support, exclude, region=region)
        if result.shots is not None:
            shots += result.shots.cpu()
        found = model.anomaly_map(result, model.config.teacher.size)
        flat = found.flatten(1)
        if result.region is None:
            median = flat.median(1).values
        else:
            inside = result.region.flatten(1).expand_as(flat)
            median = torch.stack([row[own].median() for row, own in zip(flat, inside, strict=True)])
        maps.append(torch.stack([model.top_mean(found, region), flat.amax(1), median], 1).cpu())
        if result.image is not None:
            images.append(result.image.cpu())
        teacher.append(level_statistics(levels).cpu())
    return _Parts(torch.cat(maps), torch.cat(images) if images else torch.empty(0), torch.cat(teacher), shots)


def _batches(source: Normals) -> Iterator[Batch]:
    for start in range(0, len(source), BATCH):
        yield _batch(source, range(start, min(start + BATCH, len(source))))


def _batch(source: Normals, indices: Sequence[int], exclude: Exclude | None = None) -> Batch:
    return Batch(source.levels(indices), exclude, getattr(source, "regions", whole)(indices))
