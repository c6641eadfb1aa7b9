"""Good images that come later: into the supports, memory and thresholds of a trained run, without training."""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from bkd_fast.artifact import (
    SUPPORT,
    UPDATES,
    Addition,
    Calibration,
    DataSource,
    Manifest,
    load_trained,
    read_category,
    save_trained,
)
from bkd_fast.data import FileRecord, ImageDataset, Sample, check_samples, file_records, load_image, split_normals
from bkd_fast.data.dataset import GOOD
from bkd_fast.data.progress import counted, progress_bar
from bkd_fast.data.support import STORED
from bkd_fast.errors import BKDError, few
from bkd_fast.files import atomic_write
from bkd_fast.model import BKD
from bkd_fast.model.ambient import settled
from bkd_fast.model.calibration import learn_more, takes_items, whole
from bkd_fast.model.support import Support
from bkd_fast.normals.features import FeatureSource
from bkd_fast.normals.thresholds import Measured, Normals, can_leave_out, image_scores, measure_normals
from bkd_fast.version import __version__

log = logging.getLogger("bkd_fast")
EXTREME = 1e-4  # p-value of a score among those of all good images, from their median and median absolute deviation

LOGGED = (
    "when",
    "folder",
    "learned",
    "validation",
    "threshold_before",
    "threshold_after",
    "pixel_threshold_before",
    "pixel_threshold_after",
    "thresholds_from",
)  # columns of updates.csv


class Kept:
    """Images of which a run holds the levels (1, k, C_l, H_l, W_l), as :class:`Normals`."""

    def __init__(self, levels: Sequence[Tensor], device: torch.device) -> None:
        self.stored, self.device = [level[0] for level in levels], device
        self.image_of = range(len(self.stored[0]) if self.stored else 0)

    def __len__(self) -> int:
        return len(self.image_of)

    def levels(self, indices: Sequence[int]) -> list[Tensor]:
        """Return the levels (N, C_l, H_l, W_l)."""
        return [level[list(indices)].float().to(self.device) for level in self.stored]


class Joined:
    """Several :class:`Normals` one after the other; indices are asked for in ascending order."""

    def __init__(self, *parts: Normals) -> None:
        self.parts = [part for part in parts if len(part)]
        self.image_of: list[int] = []
        for part in self.parts:
            first = self.image_of[-1] + 1 if self.image_of else 0
            self.image_of += [first + image for image in part.image_of]

    def __len__(self) -> int:
        return len(self.image_of)

    def levels(self, indices: Sequence[int]) -> list[Tensor]:
        """Return the levels (N, C_l, H_l, W_l)."""
        found = [part.levels(own) for part, own in self._split(indices)]
        return [torch.cat(level) for level in zip(*found, strict=True)]

    def regions(self, indices: Sequence[int]) -> Tensor | None:
        """Return what of tiles is looked at, (N, H, W) bool; None where the model knows it."""
        found = [getattr(part, "regions", whole)(own) for part, own in self._split(indices)]
        known = [region for region in found if region is not None]
        return torch.cat(known) if known else None

    def _split(self, indices: Sequence[int]) -> Iterator[tuple[Normals, list[int]]]:
        """Yield the parts that are asked for, and which of their own images."""
        start = 0
        for part in self.parts:
            own = [index - start for index in indices if start <= index < start + len(part)]
            if own:
                yield part, own
            start += len(part)


@dataclass(frozen=True)
class Former:
    """The images that a run was trained and validated on; ``problem``: why they are not at hand."""

    train: list[Sample]
    validation: list[Sample]
    problem: str | None


@settled(build=True)
def add_normals(
    run: Path,
    samples: Sequence[Sample],
    root: str,
    device: torch.device,
    *,
    skip_unreadable: bool = False,
    dry_run: bool = False,
    cache_gb: float = 2.0,
    progress: bool | None = None,
) -> str:
    """Add good images to a run, which is replaced in one step.

    The images are checked and divided as in training; a single one is learned from. Supports and memory take them in
    (:func:`bkd_fast.model.calibration.learn_more`); weights and the teacher's statistics stay. Thresholds and the
    statistics of drift are measured as in training, from the former images and the new ones. If a former image is
    missing or has changed, they come from the supports in the run and the new images, and the scales of maps and scores
    stay as they are.

    Args:
        run: folder of one trained category, locked by the caller.
        samples: the images.
        root: their folder, for the log; empty where they have none.
        device: of the network.
        skip_unreadable: leave out images that cannot be decoded, with a warning that names them.
        dry_run: measure and warn, and leave the run as it is.
        cache_gb: size of the teacher-feature cache in GB (float16).
        progress: show a progress bar; None: in a terminal or a notebook, else a line now and then.

    Returns:
        What was added, the false alarms to expect, the thresholds before and after, and what is now out of date.

    Raises:
        BKDError: an unusable run or image, a run of several categories, or no image that is new. The run then stays as
            it was.
    """
    manifest = read_category(run)
    if manifest.unified is not None:
        raise BKDError("a model of several categories takes no new images: train again with --unified and all images")
    trained = load_trained(run)
    if trained.config.roi is not None and trained.roi is None:
        raise BKDError(f"{run} has a mask for each image of its training: train again with the new images and masks")
    config, model, before = trained.config, trained.model.to(device), manifest.calibration
    records = file_records(samples)
    new = check_samples(
        _new(samples, records, manifest.source),
        skip_unreadable=skip_unreadable,
        tile=config.teacher.tile,
        config=config.data,
        roi=trained.roi,
    )
    learned, held = new, list[Sample]()
    if len(new) > 1:
        learned, held = split_normals(new, config.training.validation_share, config.training.seed)
    former = _former(manifest.source)
    if not new or (former.problem is not None and not held and not can_leave_out(model)):
        needed = "one" if former.problem is None or can_leave_out(model) else "two, as the former ones are gone"
        raise BKDError(f"{len(new)} images can be added: expected at least {needed}")
    if takes_items(model) and any(memory.get_buffer("origin").max() >= manifest.items for memory in model.memories):
        raise BKDError(f"{run} does not fit its manifest: its memory is of more images than it was trained on")
    used = [learned, held] if former.problem else [learned, held, former.train, former.validation]
    with ExitStack() as stack:

        def features(part: list[Sample], what: str) -> FeatureSource:
            dataset = ImageDataset(part, config.teacher.size, config.teacher.tile or 0, config.data, trained.roi)
            budget = int(cache_gb * 1e9 * len(part) / sum(map(len, used)))
            source = FeatureSource(dataset, model.teacher, device, budget)
            stack.callback(source.close)
            for _ in counted(source.fill(), progress_bar(len(source), f"features of {what}", "image", progress)):
                pass
            return source

        fresh, apart, *others = [
            features(part, what) for part, what in zip(used, 2 * ["new images"] + 2 * ["former images"], strict=False)
        ]
        support = model.make_support([level.to(device) for level in trained.support], own=True)
        seen = image_scores(model, support, Joined(fresh, apart))
        _warn_of_unlike(seen, [*learned, *held], before)
        shown = len(manifest.shown)
        chosen = learn_more(
            model,
            trained.support[-1][0].float() if config.retrieves else None,
            shown,
            (fresh.levels([index]) for index in range(len(fresh))),
            len(fresh),
            manifest.items,
            torch.Generator().manual_seed(config.training.seed),
            fresh.regions,
        )
        levels = _support_levels(trained.support, chosen, shown, fresh)
        support = model.make_support([level.to(device) for level in levels])
        items = [*manifest.shown, *range(manifest.items, manifest.items + len(fresh))]
        after = replace(manifest, bkd_fast=__version__, shown=[items[index] for index in chosen])
        kept = Kept(trained.support if former.problem and not manifest.tiles else [], device)
        if former.problem is None:
            train, validation = Joined(others[0], fresh), Joined(others[1], apart)
            measured = measure_normals(model, support, train, validation, after.shown if config.retrieves else [])
        else:
            measured = _measured_without(model, support, kept, fresh, apart, manifest, after)
        earlier = (len(kept), 0) if former.problem else (len(former.train), len(former.validation))
        _warn_of_extreme(measured, learned, held, *earlier)
        pictures = [
            fresh.dataset.array(index - shown)
            if index >= shown
            else load_image(run / manifest.file(SUPPORT) / f"{index:03}.png", STORED)
            for index in chosen
        ]
        if manifest.tiles:
            after = replace(after, tiles=[*manifest.tiles, *fresh.dataset.tiles])
    calibration = Calibration.of(measured.scores, measured.normal_level, before.false_alarms, measured.teacher)
    addition = Addition(
        root,
        datetime.now(timezone.utc).isoformat(),
        {sample.name: records[sample.name] for sample in learned},
        {sample.name: records[sample.name] for sample in held},
        _scored(measured, former, len(kept)),
        (before.threshold, calibration.threshold),
        (before.pixel_threshold, calibration.pixel_threshold),
    )
    source = replace(manifest.source, additions=[*manifest.source.additions, addition])
    after = replace(after, calibration=calibration, source=source)
    lines = [
        _sentence(model, manifest, chosen, len(learned), len(held)),
        f"above the threshold before: {sum(score > before.threshold for score in seen)} of {len(seen)} new images",
        calibration.sentence(),
        f"image threshold {before.threshold:.4g} -> {calibration.threshold:.4g}, from {addition.scored}",
    ]
    if former.problem is not None:
        lines.append(f"{former.problem}; the scales of maps and scores stay as they were")
    if before.source == "calibration":
        lines.append(f"the {len(before.scores)} images of `bkd-fast calibrate` no longer count: give them again")
    if dry_run:
        return "\n".join(["nothing is written: this was a dry run", *lines])
    save_trained(run, model, after, pictures, levels)
    _write_log(run, source)
    return "\n".join(lines + _stale(run))


def _new(samples: Sequence[Sample], records: Mapping[str, FileRecord], source: DataSource) -> list[Sample]:
    """Return the samples that a run does not have; others are named.

    Raises:
        BKDError: there are none.
    """
    rest = list(samples)
    for files, what in (
        (source.used, "are in the run already"),
        (source.test_files, "were set aside for testing in training"),
    ):
        known = {record.sha256 for record in files.values()}
        same = [sample.name for sample in rest if records[sample.name].sha256 in known]
        if same:
            log.warning("%d of %d images %s and are left out: %s", len(same), len(samples), what, few(same))
        rest = [sample for sample in rest if sample.name not in set(same)]
    if not rest:
        raise BKDError(f"none of {len(samples)} images is new to the run: expected good images that it has not seen")
    return rest


def _former(source: DataSource) -> Former:
    """Return the images that a run was trained and validated on, if every one is as it was."""
    names = [*source.train_files, *source.validation_files]
    home = max(source.homes, key=lambda place: sum((place / name).is_file() for name in names))
    parts: dict[str, list[Sample]] = {"train_files": [], "validation_files": []}
    lost: list[str] = []
    for place, part in ((home, source), *((Path(addition.root), addition) for addition in source.additions)):
        for kind, samples in parts.items():
            records = getattr(part, kind)
            own = [Sample(place / name, 0, GOOD, name=name) for name in records]
            there = file_records([sample for sample in own if sample.path.is_file()])
            lost += [str(sample.path) for sample in own if there.get(sample.name) != records[sample.name]]
            samples += own
    total = sum(map(len, parts.values()))
    problem = f"{len(lost)} of {total} former images are missing or have changed, such as {lost[0]}" if lost else None
    return Former(parts["train_files"], parts["validation_files"], problem)


def _support_levels(former: Sequence[Tensor], chosen: Sequence[int], shown: int, fresh: Normals) -> list[Tensor]:
    """Return the levels (1, k, C_l, H_l, W_l) of the chosen supports; none without forward branch."""
    kept = [index for index in chosen if index < shown]
    added = [[level.cpu() for level in fresh.levels([index - shown])] for index in chosen if index >= shown]
    return [
        torch.cat([level[:, kept], *(image[number].unsqueeze(0).to(level.dtype) for image in added)], 1)
        for number, level in enumerate(former)
    ]


def _measured_without(
    model: BKD, support: Support, kept: Kept, fresh: FeatureSource, apart: Normals, manifest: Manifest, after: Manifest
) -> Measured:
    """Measure the new images and the supports that the run keeps, where the former images are not at hand.

    Items and supports of other former images are nobody's own.
    """
    row = {item: index for index, item in enumerate(manifest.shown)} if len(kept) else {}
    row.update({manifest.items + index: len(kept) + index for index in range(len(fresh))})
    origin = None
    if takes_items(model):
        origin = torch.tensor([row.get(item, -1) for item in model.memories[0].get_buffer("origin").tolist()])
    bank = [row.get(item, -1) for item in after.shown] if model.config.retrieves else []
    return measure_normals(model, support, Joined(kept, fresh), apart, bank, origin=origin, rescale=False)


def _warn_of_unlike(scores: Sequence[float], samples: Sequence[Sample], before: Calibration) -> None:
    """Name the images that score higher than every normal image of the run so far."""
    order = sorted(zip(scores, samples, strict=True), key=lambda pair: -pair[0])
    above = [sample.name for score, sample in order if score > before.scores[-1]]
    if above:
        log.warning(
            "%d of %d new images score higher than each of the %d normal images so far (p-value %.2g): %s",
            len(above), len(samples), len(before.scores), 1 / (len(before.scores) + 1), few(above, count=10),
        )  # fmt: skip


def _warn_of_extreme(
    measured: Measured, learned: Sequence[Sample], held: Sequence[Sample], train: int, validation: int
) -> None:
    """Name the new images that are unlike all others, new ones included.

    Args:
        train, validation: how many former images were measured before the new ones of each kind.
    """
    first = validation + len(held)  # of the training images
    names = {validation + index: sample.name for index, sample in enumerate(held)}
    names.update({first + train + index: sample.name for index, sample in enumerate(learned)})
    scores = np.array(measured.scores.scores)
    median = np.median(scores)
    spread = 1.4826 * float(np.median(np.abs(scores - median)))  # the std of a normal distribution
    if not spread:
        return
    limit = NormalDist(float(median), spread).inv_cdf(1 - EXTREME)
    found = zip(measured.images, scores, strict=True)
    extreme = [names[image] for image, score in found if image in names and score > limit]
    if extreme:
        log.warning(
            "%d of %d new images are unlike all other good images (p-value below %g); take out those with defects: %s",
            len(extreme), len(names), EXTREME, few(extreme, count=10),
        )  # fmt: skip


def _scored(measured: Measured, former: Former, supports: int) -> str:
    """Return which images the thresholds come from."""
    count = f"{len(measured.images)} images: "
    if measured.scores.source == "validation":
        return count + ("validation images, former and new" if former.problem is None else "new validation images")
    if former.problem is None:
        return count + "those of training and the new ones"
    return count + (f"{supports} supports in the run and the new ones" if supports else "the new ones")


def _sentence(model: BKD, manifest: Manifest, chosen: Sequence[int], learned: int, held: int) -> str:
    new = sum(index >= len(manifest.shown) for index in chosen)
    text = f"new images: {learned} to learn from, {held} for validation"
    if model.config.forward_branch:
        text += f"; new among {len(chosen)} supports: {new}"
    if takes_items(model):
        memories = [memory.get_buffer("origin") for memory in model.memories]
        count = sum(int((origin >= manifest.items).sum()) for origin in memories)
        text += f"; among {sum(map(len, memories))} memory items: {count}"
    return text


def _write_log(run: Path, source: DataSource) -> None:
    """Write ``updates.csv``, a row for each addition, as the manifest has them."""
    with atomic_write(run / UPDATES) as file:
        writer = csv.writer(file)
        writer.writerow(LOGGED)
        for each in source.additions:
            counts = len(each.train_files), len(each.validation_files)
            writer.writerow([each.when, each.root, *counts, *each.threshold, *each.pixel_threshold, each.scored])


def _stale(run: Path) -> list[str]:
    """Return a line about each kind of file in the run that is of the run before."""
    described = [path.with_suffix("") for path in sorted(run.glob("*.*.json"))]  # model.onnx.json
    exports = [path.name for path in described if path.is_file()]
    results = [name for name in ("metrics.json", "scores.csv", "report.html") if (run / name).is_file()]
    return [
        f"{', '.join(names)} in the run: of the run before, {command} again"
        for names, command in ((exports, "export"), (results, "evaluate"))
        if names
    ]
