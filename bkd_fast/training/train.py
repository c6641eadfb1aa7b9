"""Training: from a folder of normal images to a run folder."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric

from bkd_fast.artifact import FORMAT, MANIFEST, DataSource
from bkd_fast.config import BKDConfig
from bkd_fast.data import Category, check_samples, find_categories, split_normals
from bkd_fast.errors import BKDError
from bkd_fast.files import write_json
from bkd_fast.model.bottleneck import check_strides
from bkd_fast.model.teacher import Teacher, with_image_size
from bkd_fast.training.sampler import Schedule
from bkd_fast.training.trainer import CacheBudget, Job, Trainer
from bkd_fast.training.weights import load_weights
from bkd_fast.version import __version__


def train(
    data: str | Path,
    out: str | Path,
    config: BKDConfig | None = None,
    *,
    categories: Sequence[str] | None = None,
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
) -> Path:
    """Train one model a category and write the run folder.

    Args:
        data: MVTec AD layout (one category or many), or a plain folder of good images.
        out: the run folder; must be new or empty unless ``resume``.
        config: the default preset where None.
        categories: names to train; None = all there are.
        anomalous, masks: for a plain folder, folders of defective images and of their masks, kept for evaluation.
        devices: processes to train with; under ``torchrun`` its processes are used.
        accelerator: ``auto``, ``cpu`` or ``cuda``.
        precision: ``auto`` (bf16 where the GPU has it, else float32), ``32``, ``bf16`` or ``fp16`` autocast.
        resume: continue an interrupted run of the same arguments; finished categories are left alone.
        skip_unreadable: leave out images that cannot be decoded, with a warning that names them.
        cache_gb: size of the teacher-feature cache in GB (float16). Images that do not fit are re-encoded every epoch.
        cache_dir: folder of the cache; None = in memory.
        progress: a progress bar; None = where standard error is a terminal.

    Returns:
        ``out``.

    Raises:
        BKDError: unusable images, folders or configuration, before anything is written; a loss that is not finite.
        KeyboardInterrupt: after an interrupt, once the checkpoint is written.
    """
    config = config or BKDConfig()
    out = Path(out)
    found = find_categories(Path(data), categories, anomalous=_path(anomalous), masks=_path(masks))
    config = config.with_changes(teacher=with_image_size(config.teacher))
    teacher = Teacher(config.teacher, load_weights(config.teacher))  # its errors before images are decoded
    if config.student is not None:
        check_strides(config.teacher.name, teacher.strides)
    jobs = [
        _job(category, config, out if len(found) == 1 else out / category.name, skip_unreadable) for category in found
    ]
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        _claim(out, resume)
    fabric = Fabric(
        accelerator=accelerator,
        devices=devices,
        strategy="ddp" if devices > 1 or "TORCHELASTIC_RUN_ID" in os.environ else "auto",
        precision=_precision(precision, accelerator),
    )
    fabric.launch()
    cache = CacheBudget(int(cache_gb * 1e9), _path(cache_dir))
    for job in jobs:
        source = DataSource(
            root=str(Path(data).resolve()),
            category=job.name,
            anomalous=None if anomalous is None else str(Path(anomalous).resolve()),
            masks=None if masks is None else str(Path(masks).resolve()),
            train_files=[str(sample.path.name) for sample in job.train],
            validation_files=[str(sample.path.name) for sample in job.validation],
        )
        if resume and (job.folder / MANIFEST).is_file():
            continue
        Trainer(fabric, config, job, source, cache, progress).run()
    if len(jobs) > 1 and fabric.is_global_zero:
        names = [job.name for job in jobs]
        write_json(out / MANIFEST, {"format": FORMAT, "bkd_fast": __version__, "categories": names})
    fabric.barrier()
    return out


def _job(category: Category, config: BKDConfig, folder: Path, skip_unreadable: bool) -> Job:
    samples = check_samples(category.train, skip_unreadable=skip_unreadable)
    train_samples, validation = split_normals(samples, config.training.validation_share, config.training.seed)
    Schedule(len(train_samples), config)  # its error for too few images, before anything is written
    return Job(category.name, train_samples, validation, folder)


def _claim(out: Path, resume: bool) -> None:
    """Makes sure that the run folder can be written and is not somebody else's."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        occupied = any(out.iterdir())
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise BKDError(f"the output folder {out} cannot be written ({error.strerror}): choose another --out") from error
    if occupied and not resume:
        raise BKDError(f"the output folder {out} is not empty: choose another --out, or resume with --resume")


def _precision(name: str, accelerator: str) -> Any:
    choices = {"32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
    if name == "auto":
        gpu = accelerator != "cpu" and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        return choices["bf16" if gpu else "32"]
    if name not in choices:
        raise BKDError(f"precision is {name!r}: expected auto, {', '.join(choices)}")
    return choices[name]


def _path(value: str | Path | None) -> Path | None:
    return None if value is None else Path(value)
