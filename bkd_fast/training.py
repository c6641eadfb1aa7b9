"""Training: from a folder of normal images to a run folder."""

from __future__ import annotations

import logging
import math
import os
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from tqdm import tqdm

from bkd_fast.batches import FeatureSource, Schedule
from bkd_fast.checkpoint import Progress, load_checkpoint, save_checkpoint, write_log
from bkd_fast.config import BKDConfig
from bkd_fast.data import (
    Category,
    ImageDataset,
    Sample,
    check_samples,
    draw_support,
    find_categories,
    load_image,
    split_normals,
)
from bkd_fast.errors import BKDError
from bkd_fast.files import write_json
from bkd_fast.model import BKD
from bkd_fast.model.bkd import Prepared
from bkd_fast.model.calibration import balance_maps, calibrate, choose_pool
from bkd_fast.model.teacher import Teacher
from bkd_fast.run import CHECKPOINT, CONFIG, FORMAT, LOG, Calibration, DataSource, save_trained
from bkd_fast.training_step import TrainingStep, make_optimizer, train_step
from bkd_fast.version import __version__

CHECKPOINT_SECONDS = 60  # least time between two checkpoints of an undisturbed training
INFERENCE_BATCH = 8


@dataclass(frozen=True)
class Job:
    """One category to train, its images checked and divided."""

    name: str
    train: list[Sample]
    held_out: list[Sample]
    folder: Path


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
    progress: bool | None = None,
) -> Path:
    """Trains one model a category and writes the run folder.

    Args:
        data: MVTec AD layout (one category or many), or a plain folder of good images.
        out: the run folder; must be new or empty unless ``resume``.
        config: the default preset where None.
        categories: names to train; None = all there are.
        anomalous, masks: for a plain folder, folders of defective images and of their masks, kept for evaluation.
        devices: processes to train with; under ``torchrun`` its processes are used.
        accelerator: ``auto``, ``cpu`` or ``cuda``.
        precision: ``auto`` (bf16 where the GPU has it, else float32), ``32``, ``bf16`` or ``fp16`` autocast.
        resume: go on where an interrupted run with the same arguments stopped; whole categories are left alone.
        skip_unreadable: leave out images that cannot be decoded, with a warning that names them.
        cache_gb: memory for teacher features of training images that need not be computed again.
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
    jobs = [
        _job(category, config, out if len(found) == 1 else out / category.name, skip_unreadable) for category in found
    ]
    Teacher(config)  # its errors (an unknown model, no weights) before anything is written
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        _claim(out, resume)
    fabric = Fabric(
        accelerator=accelerator,
        devices=devices,
        strategy="ddp" if devices > 1 or "TORCHELASTIC_RUN_ID" in os.environ else "auto",
        precision=_precision(precision, accelerator),
    )
    fabric.launch()
    for job in jobs:
        source = DataSource(
            root=str(Path(data).resolve()),
            category=job.name,
            anomalous=None if anomalous is None else str(Path(anomalous).resolve()),
            masks=None if masks is None else str(Path(masks).resolve()),
            train_files=[str(sample.path.name) for sample in job.train],
            held_out_files=[str(sample.path.name) for sample in job.held_out],
        )
        if resume and (job.folder / CONFIG).is_file():
            continue
        _Trainer(fabric, config, job, source, cache_gb, progress).run()
    if len(jobs) > 1 and fabric.is_global_zero:
        write_json(out / CONFIG, {"format": FORMAT, "bkd_fast": __version__, "categories": [job.name for job in jobs]})
    fabric.barrier()
    return out


class _Trainer:
    """Trains one category."""

    def __init__(
        self, fabric: Fabric, config: BKDConfig, job: Job, source: DataSource, cache_gb: float, progress: bool | None
    ) -> None:
        self.fabric, self.config, self.job, self.source = fabric, config, job, source
        self.show = progress if fabric.is_global_zero else False
        fabric.seed_everything(config.seed, verbose=False)
        self.schedule = Schedule(len(job.train), config, rank=fabric.global_rank, world=fabric.world_size)
        self.model = BKD(config).to(fabric.device)
        learned = any(parameter.requires_grad for parameter in self.model.parameters())
        self.optimizer: Any = make_optimizer(self.model, config) if learned else None
        dataset = ImageDataset(job.train, config.image_size)
        self.features = FeatureSource(dataset, self.model.teacher, fabric.device, int(cache_gb * 1e9))
        self.checkpoint = job.folder / CHECKPOINT
        self.saved_at = time.monotonic()

    def run(self) -> None:
        """Trains to the end, calibrates on the held-out normals and writes the category's folder."""
        model, fabric = self.model, self.fabric
        if self.checkpoint.is_file():
            state = load_checkpoint(self.checkpoint, model, self.optimizer)
        else:
            state = Progress()
            generator = torch.Generator().manual_seed(self.config.seed)
            calibrate(model, self.features.batches(INFERENCE_BATCH), len(self.job.train), generator)
        self.features.fill()
        self.pool = self._choose_pool()
        if self.optimizer is None:  # calibration was all
            self._finish()
            return
        step, optimizer = fabric.setup(TrainingStep(model), self.optimizer)
        step.train()
        scaler = getattr(fabric.strategy.precision, "scaler", None)
        if scaler is not None and state.scaler:
            scaler.load_state_dict(state.scaler)
        total = self.config.epochs * self.schedule.steps
        done = state.epoch * self.schedule.steps + state.step
        bar = tqdm(
            total=total,
            initial=done,
            desc=self.job.name,
            unit="step",
            dynamic_ncols=True,
            disable=None if self.show is None else not self.show,
        )
        with bar, _interruptible() as interrupted:
            while state.epoch < self.config.epochs:
                self._epoch(step, optimizer, state, bar, interrupted)
        self._finish()

    def _choose_pool(self) -> list[int]:
        """The images that queries look up their support among; empty where supports are drawn."""
        if not self.config.forward_branch or self.config.support_draw != "nearest":
            return []
        count = len(self.job.train)
        parts = (self.features.levels([index])[-1] for index in range(count))
        pool = choose_pool(parts, self.config.support_pool)
        self.place = torch.full((count,), -1)
        self.place[pool] = torch.arange(len(pool))
        self.prepared = self.model.prepare(self._support(pool))
        return pool

    def _support(self, indices: Sequence[int]) -> list[Tensor]:
        """What :meth:`BKD.prepare` takes, of training images."""
        levels = [level.unsqueeze(0) for level in self.features.levels(indices)[self.model.first :]]
        return [level.half() for level in levels] if self.config.support_draw == "nearest" else levels

    def _epoch(self, step: nn.Module, optimizer: Any, state: Progress, bar: tqdm, interrupted: list[bool]) -> None:
        started, images = time.monotonic(), 0
        for part in self.schedule.epoch(state.epoch, state.step):
            for group in optimizer.param_groups:
                group["lr"] = group["scale"] * self._rate(state.epoch, state.step)
            query = self.features.levels(part.queries)
            support: Any = []
            if part.supports:
                support = self.model.support_levels(self.features.supports(part, self.config.support_augmentation))
            elif self.pool:
                support = self.prepared
            exclude = self.place[part.queries].to(self.fabric.device) if self.pool else None
            values, moves = train_step(self.fabric, step, optimizer, query, support, exclude, self.config.clip_norm)
            largest = [float(move[0]) for move in moves]
            if not math.isfinite(values["total"]):
                raise self._not_finite(state, values, largest)
            state.step += 1
            images += len(part.queries) * self.fabric.world_size
            for name, value in values.items():
                state.sums[name] = state.sums.get(name, 0.0) + value
            for level, move in enumerate(moves, start=1):
                state.sums[f"offset_{level}"] = state.sums.get(f"offset_{level}", 0.0) + float(move[1])
                state.sums[f"max_offset_{level}"] = max(state.sums.get(f"max_offset_{level}", 0.0), largest[level - 1])
            speed = images / (time.monotonic() - started)
            bar.set_postfix_str(f"loss {values['total']:.4f}, {speed:.1f} images/s", refresh=False)
            bar.update()
            if interrupted[0]:
                self._save(state)
                raise KeyboardInterrupt
        seconds = time.monotonic() - started
        means = {
            name: value if name.startswith("max") else value / self.schedule.steps for name, value in state.sums.items()
        }
        state.rows.append(
            {
                "epoch": state.epoch + 1,
                **means,
                "learning_rate": self._rate(state.epoch, self.schedule.steps - 1),
                "seconds": round(seconds, 3),
            }
        )
        state.epoch, state.step, state.sums = state.epoch + 1, 0, {}
        if time.monotonic() - self.saved_at > CHECKPOINT_SECONDS or state.epoch == self.config.epochs:
            self._save(state)

    def _rate(self, epoch: int, step: int) -> float:
        """The learning rate of a step, a function of its number alone."""
        if self.config.schedule == "constant":
            return self.config.learning_rate
        done = (epoch * self.schedule.steps + step) / (self.config.epochs * self.schedule.steps)
        return self.config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))

    def _save(self, state: Progress) -> None:
        scaler = getattr(self.fabric.strategy.precision, "scaler", None)
        state.scaler = scaler.state_dict() if scaler is not None else {}
        if self.fabric.is_global_zero and all(torch.isfinite(p).all() for p in self.model.parameters()):
            save_checkpoint(self.checkpoint, self.model, self.optimizer, state)
            if state.rows:
                write_log(self.job.folder / LOG, state.rows)
        self.fabric.barrier()
        self.saved_at = time.monotonic()

    def _not_finite(self, state: Progress, values: dict[str, float], largest: list[float]) -> BKDError:
        offsets = f"largest offset {max(largest):.3g} feature pixels" if largest else "no forward branch"
        kept = f"the last good weights are in {self.checkpoint}" if self.checkpoint.is_file() else "no checkpoint yet"
        parts = ", ".join(f"{name} {value:g}" for name, value in values.items())
        return BKDError(
            f"the loss of {self.job.name} is not finite in epoch {state.epoch + 1}, step {state.step + 1}: {parts}; "
            f"{offsets}; {kept}. Lower learning_rate or offset_lr_scale, bound the offsets "
            "(offset_activation='tanh'), or set clip_norm."
        )

    def _finish(self) -> None:
        """Support, thresholds and scales, then the folder; only then is the checkpoint dropped."""
        if self.fabric.is_global_zero:
            self.model.eval()
            generator = torch.Generator().manual_seed(self.config.seed)
            count = min(self.config.shots, len(self.job.train))
            chosen = self.pool or draw_support(len(self.job.train), count, generator)
            support = self._support(chosen) if self.config.forward_branch else []
            calibration = calibrate_thresholds(
                self.model, self.model.prepare(support), self.job.held_out, self.fabric.device
            )
            images = [load_image(self.job.train[index].path) for index in chosen]
            save_trained(self.job.folder, self.model, calibration, self.source, images, support, __version__)
            self.checkpoint.unlink(missing_ok=True)
        self.features.close()
        self.fabric.barrier()


@torch.no_grad()
def calibrate_thresholds(
    model: BKD, prepared: Prepared, held_out: Sequence[Sample], device: torch.device
) -> Calibration:
    """Thresholds and scales from held-out normal images; balances the model's maps.

    Args:
        prepared: the support, as :meth:`BKD.prepare` gives it.
        held_out: normals that were not trained on.
        device: the model's.
    """
    config = model.config
    dataset = ImageDataset(list(held_out), config.image_size)

    def batches() -> Iterator[Tensor]:
        for start in range(0, len(dataset), INFERENCE_BATCH):
            chunk = [dataset[index][0] for index in range(start, min(start + INFERENCE_BATCH, len(dataset)))]
            yield torch.stack(chunk).to(device)

    if config.fusion == "geometric":
        balance_maps(model, batches(), prepared)
    scores, maxima, medians = [], [], []
    for images in batches():
        maps = model.anomaly_map(model.distill(model.teacher(images), prepared), config.image_size)
        scores += model.image_score(maps).tolist()
        maxima += maps.flatten(1).amax(1).tolist()
        medians += maps.flatten(1).median(1).values.tolist()
    # "higher": with few held-out images the quantile is the largest of them, not a value between two.
    threshold, pixel = (
        float(np.quantile(values, config.threshold_quantile, method="higher")) for values in (scores, maxima)
    )
    # Positive and below the threshold, as a logarithmic colour scale needs it.
    level = min(max(float(np.median(medians)), 1e-30), 0.5 * pixel)
    return Calibration(threshold, pixel, level, model.map_scale, model.map_exponent)


def _job(category: Category, config: BKDConfig, folder: Path, skip_unreadable: bool) -> Job:
    samples = check_samples(category.train, skip_unreadable=skip_unreadable)
    train_samples, held_out = split_normals(samples, config.holdout, config.seed)
    Schedule(len(train_samples), config)  # its error for too few images, before anything is written
    return Job(category.name, train_samples, held_out, folder)


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
        raise BKDError(f"the output folder {out} is not empty: choose another --out, or go on with --resume")


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


@contextmanager
def _interruptible() -> Iterator[list[bool]]:
    """Turns the first Ctrl-C into a flag that is read between two steps; a second one acts at once."""
    flag = [False]

    def handle(_: int, __: Any) -> None:
        flag[0] = True
        logging.getLogger("bkd_fast").warning("stopping after this step (Ctrl-C again to stop at once)")
        signal.signal(signal.SIGINT, previous)

    try:
        previous = signal.signal(signal.SIGINT, handle)
    except ValueError:  # not the main thread, which alone receives signals
        yield flag
        return
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, previous)
