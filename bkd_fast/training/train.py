"""Training: from a folder of normal images to a run folder."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric

from bkd_fast.artifact import CHECKPOINT, DataSource, read_category, read_manifest, write_manifest
from bkd_fast.config import BKDConfig, RetrievedSupport
from bkd_fast.data import (
    Category,
    FileRecord,
    Sample,
    check_samples,
    file_records,
    find_categories,
    find_unified,
    image_files,
    infer_white,
    load_roi,
    split_normals,
)
from bkd_fast.data.dataset import with_rois
from bkd_fast.errors import BKDError, check_choice, check_float, check_int, few
from bkd_fast.files import MANIFEST, checksum, is_empty, locked
from bkd_fast.model.ambient import settled
from bkd_fast.model.bottleneck import check_strides
from bkd_fast.model.teacher import Teacher, with_image_size
from bkd_fast.training.checkpoint import read_begun
from bkd_fast.training.loggers import check_loggers, open_loggers
from bkd_fast.training.sampler import Schedule
from bkd_fast.training.trainer import Job, Trainer
from bkd_fast.training.weights import load_weights
from bkd_fast.version import __version__

log = logging.getLogger("bkd_fast")
WHITES = ("integer_white", "float_white")  # options of DataConfig that the first training of a run may infer


@settled(gradients=True, build=True)
def train(
    data: str | Path,
    out: str | Path,
    config: BKDConfig | None = None,
    *,
    categories: Sequence[str] | None = None,
    unified: bool = False,
    anomalous: str | Path | None = None,
    masks: str | Path | None = None,
    devices: int = 1,
    accelerator: str = "auto",
    precision: str = "auto",
    resume: bool = False,
    skip_unreadable: bool = False,
    cache_gb: float = 2.0,
    cache_dir: str | Path | None = None,
    progress: bool | None = None,
    loggers: Any = None,
) -> Path:
    """Train one model a category, or one of all, and write the run folder.

    Args:
        data: MVTec AD layout (one category or many), or a plain folder of good images.
        out: the run folder; must be new or empty unless ``resume``.
        config: the default preset where None.
        categories: names to train; None = all there are.
        unified: train one model of all categories. An image is then decided by the thresholds of the category of the
            support nearest to it. ``data`` may also be a folder with a folder of good images for each category.
        anomalous, masks: for a plain folder, folders of defective images and of their masks, kept for evaluation.
        devices: processes to train with; under ``torchrun`` its processes are used.
        accelerator: ``auto``, ``cpu`` or ``cuda``.
        precision: ``auto`` (bf16 where the GPU has it, else float32), ``32``, ``bf16`` or ``fp16`` autocast.
        resume: continue an interrupted run of the same arguments, with the same images; finished categories are left
            alone.
        skip_unreadable: leave out images that cannot be decoded, with a warning that names them.
        cache_gb: size of the teacher-feature cache in GB (float16). Images that do not fit are re-encoded every epoch.
        cache_dir: folder of the cache; None = in memory.
        progress: a progress bar; None: in a terminal or a notebook, else a line an epoch.
        loggers: experiment trackers: ``csv``, ``tensorboard``, ``mlflow``, ``wandb``, a logger of Lightning Fabric
            or several in a list. They get the configuration, losses and learning rate of each step, time and
            memory of each part, and the thresholds. One that fails later is named once, and the training continues.

    Returns:
        ``out``.

    Raises:
        BKDError: unusable images, folders, loggers or configuration, before anything is written; another process writes
            to ``out``; a loss that is not finite.
        KeyboardInterrupt: after an interrupt, once the checkpoint is written.
    """
    config = config or BKDConfig()
    out, data = Path(out), Path(data)
    devices = check_int("devices", devices, 1, 4096)
    check_choice("accelerator", accelerator, ("auto", "cpu", "cuda"))
    cache_gb = check_float("cache_gb", cache_gb, 0, 1e6)
    plugin = _precision(precision, accelerator)
    given = check_loggers(loggers)
    if accelerator == "cuda" and torch.cuda.device_count() < devices:
        raise BKDError(f"devices is {devices}, and torch sees {torch.cuda.device_count()} CUDA devices: use fewer")
    first = int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))) == 0  # of the processes that train together
    names: tuple[str, ...] = ()
    if unified:
        if anomalous is not None or masks is not None:
            raise BKDError("unified takes several categories, and anomalous and masks belong to one: leave them out")
        merged, names = find_unified(data, categories)
        _check_unified(config, len(names))
        found = [merged]
    else:
        found = find_categories(data, categories, anomalous=_path(anomalous), masks=_path(masks))
    if resume:
        _check_kind(out, [category.name for category in found], names)
    source = DataSource(str(data.resolve()), "", _absolute(anomalous), _absolute(masks))
    count = len(names or found)
    if config.roi is not None and count > 1 and Path(config.roi.mask or "").is_dir():
        raise BKDError(f"{config.roi.mask} has a mask for each image: train each of the {count} categories alone")
    with ExitStack() as stack:
        begun = out.exists()
        if first and begun:  # before anything is read that another process may be writing
            stack.enter_context(_claimed(out, resume))
        config = config.with_changes(teacher=with_image_size(config.teacher))
        teacher = Teacher(config.teacher, load_weights(config.teacher))  # its errors before images are decoded
        if config.student is not None:
            check_strides(config.teacher.name, teacher.strides)
        jobs = [
            _job(
                category,
                config,
                out if len(found) == 1 else out / category.name,
                source,
                resume,
                skip_unreadable,
                names,
            )
            for category in found
        ]
        if first and not begun:
            stack.enter_context(_claimed(out, resume))
        pending = {job.name: own for job, own in jobs if not job.done}
        params = _hyperparameters(data, config if len(jobs) > 1 else jobs[0][1], pending)
        opened = stack.enter_context(open_loggers(given if first and pending else [], out, params))
        fabric = Fabric(
            accelerator=accelerator,
            devices=devices,
            strategy="ddp" if devices > 1 or "TORCHELASTIC_RUN_ID" in os.environ else "auto",
            precision=plugin,
            loggers=list(opened),
        )
        fabric.launch()
        for job, own in jobs:
            if not job.done:
                prefix = f"{job.name}/" if len(jobs) > 1 else ""
                Trainer(fabric, own, job, int(cache_gb * 1e9), _path(cache_dir), progress, prefix).run()
        if len(jobs) > 1 and fabric.is_global_zero:
            write_manifest(out, {"bkd_fast": __version__, "categories": [job.name for job, _ in jobs]})
        fabric.barrier()
    return out


def _check_unified(config: BKDConfig, count: int) -> None:
    """Raise a BKDError unless a model of ``count`` categories can tell them apart."""
    if not isinstance(config.support, RetrievedSupport):
        raise BKDError("unified tells categories apart by the supports that a query retrieves: set support=retrieved")
    if config.teacher.tile is not None:
        raise BKDError("unified takes images whole, and a tile shows no category: leave out teacher.tile")
    for name, value in (
        ("support.bank_size", config.support.bank_size),
        ("memory.items", count if config.memory is None else config.memory.items),
    ):
        if value < count:
            raise BKDError(f"{name} is {value}, and there are {count} categories: expected at least one for each")


def _check_kind(out: Path, found: Sequence[str], names: Sequence[str]) -> None:
    """Raise a BKDError if the training to resume was begun with the other choice of ``unified``."""
    manifest = read_manifest(out) if (out / MANIFEST).is_file() else None
    one = getattr(manifest, "unified", None) is not None
    if not names and (one or (len(found) > 1 and (out / CHECKPOINT).is_file())):
        raise BKDError(f"{out} holds one model of several categories: resume with --unified, or choose another --out")
    if names and ((manifest is not None and not one) or any((out / name).is_dir() for name in names)):
        raise BKDError(f"{out} holds models of single categories: resume without --unified, or choose another --out")


def _job(
    category: Category,
    config: BKDConfig,
    folder: Path,
    source: DataSource,
    resume: bool,
    skip_unreadable: bool,
    names: tuple[str, ...],
) -> tuple[Job, BKDConfig]:
    """Return what to train, and the configuration with what is white in images of more than 8 bits."""
    if resume and (folder / MANIFEST).is_file():
        read_category(folder)  # its errors now
        return Job(category.name, [], [], folder, source, done=True, categories=names), config
    masks = None if config.roi is None else Path(config.roi.mask or "")
    each = masks if masks is not None and masks.is_dir() else None
    roi = None if masks is None or each is not None else load_roi(masks, config.data)
    mask = None if masks is None else _record(masks)
    checkpoint = folder / CHECKPOINT
    tile = config.teacher.tile
    if resume and checkpoint.is_file():
        saved, begun = read_begun(checkpoint)
        if saved.roi != mask:
            raise BKDError(f"{folder} was begun with another mask of the region of interest: resume with the same")
        whites = {name: getattr(begun.data, name) for name in WHITES if getattr(config.data, name) is None}
        config = replace(config, data=replace(config.data, **whites))
        train, validation = (
            files if each is None else with_rois(files, each) for files in _same_files(category, saved, folder)
        )
        _by_category(train, names)  # its error where there are more categories now
        check_samples([*train, *validation], tile=tile, config=config.data, roi=roi)
        return Job(category.name, train, validation, folder, saved, roi=roi, categories=names), config
    config = replace(config, data=infer_white((sample.path for sample in category.train), config.data))
    samples = list(category.train) if each is None else with_rois(category.train, each)
    samples = check_samples(samples, skip_unreadable=skip_unreadable, tile=tile, config=config.data, roi=roi)
    parts = [
        split_normals(group, config.training.validation_share, config.training.seed)
        for group in (_by_category(samples, names, 2) if names else [samples])
    ]
    train, validation = ([sample for part in parts for sample in part[index]] for index in (0, 1))
    Schedule(len(train), config)  # its error for too few images, before anything is written
    set_aside = [sample for sample in category.test if category.plain and not sample.label]
    used = replace(
        source,
        category=category.name,
        train_files=file_records(train),
        validation_files=file_records(validation),
        test_files=file_records(set_aside),
        roi=mask,
    )
    return Job(category.name, train, validation, folder, used, roi=roi, categories=names), config


def _by_category(samples: Sequence[Sample], names: Sequence[str], count: int = 1) -> list[list[Sample]]:
    """Return the images of each category of one model.

    Raises:
        BKDError: fewer than ``count`` of one.
    """
    groups = [[sample for sample in samples if sample.name.startswith(f"{name}/")] for name in names]
    for name, group in zip(names, groups, strict=True):
        if len(group) < count:
            raise BKDError(f"the category {name} has {len(group)} training image(s): expected at least {count} of each")
    return groups


def _record(path: Path) -> FileRecord:
    """Return size and SHA-256 of a mask, or of the names and sums of all masks in a folder."""
    if not path.is_dir():
        return FileRecord(path.stat().st_size, checksum(path))
    files = image_files(path)
    text = "".join(f"{file.relative_to(path).as_posix()} {checksum(file)}\n" for file in files)
    return FileRecord(sum(file.stat().st_size for file in files), hashlib.sha256(os.fsencode(text)).hexdigest())


def _hyperparameters(data: Path, config: BKDConfig, categories: Mapping[str, BKDConfig]) -> dict[str, Any]:
    """Return what trackers keep of a training: the configuration, and what differs from it in single categories."""
    common = config.to_dict()
    own = {
        name: {group: values for group, values in each.to_dict().items() if values != common[group]}
        for name, each in categories.items()
    }
    return {
        "bkd_fast": __version__,
        "dataset": str(data.resolve()),
        **common,
        "categories": {name: groups for name, groups in own.items() if groups},
    }


def _same_files(category: Category, saved: DataSource, folder: Path) -> tuple[list[Sample], list[Sample]]:
    """Return the images that an interrupted training uses, whatever has come to their folder since.

    Raises:
        BKDError: one is missing or was changed.
    """
    good = [*category.train, *(sample for sample in category.test if category.plain and not sample.label)]
    by_name = {sample.name: sample for sample in good}
    missing = [name for name in saved.used if name not in by_name]
    if missing:
        raise BKDError(f"{len(missing)} training images of {folder} are missing: {few(missing)}. Restore them")
    records = file_records([by_name[name] for name in saved.used])
    changed = [name for name, record in saved.used.items() if records[name] != record]
    if changed:
        raise BKDError(f"{len(changed)} training images of {folder} have changed: {few(changed)}. Restore them")
    new = sorted(by_name.keys() - saved.used.keys() - saved.test_files.keys())
    if new:
        log.warning("%s: %d images are new since the training began: %s", category.name, len(new), few(new))
    return [by_name[name] for name in saved.train_files], [by_name[name] for name in saved.validation_files]


@contextmanager
def _claimed(out: Path, resume: bool) -> Iterator[None]:
    """Hold the run folder, which must be new or empty unless a training resumes."""
    with locked(out):
        if not resume and not is_empty(out):
            raise BKDError(f"the output folder {out} is not empty: choose another --out, or resume with --resume")
        yield


def _precision(name: str, accelerator: str) -> Any:
    choices = {"32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
    check_choice("precision", name, ("auto", *choices))
    if name == "auto":
        gpu = accelerator != "cpu" and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        return choices["bf16" if gpu else "32"]
    return choices[name]


def _absolute(value: str | Path | None) -> str | None:
    return None if value is None else str(Path(value).resolve())


def _path(value: str | Path | None) -> Path | None:
    return None if value is None else Path(value)
