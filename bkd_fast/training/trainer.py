"""The training of one category: epochs, checkpoints, early stopping, and what is kept of it."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from tqdm import tqdm

from bkd_fast.artifact import CHECKPOINT, LOG, Calibration, DataSource, save_trained
from bkd_fast.config import BKDConfig
from bkd_fast.data import ImageDataset, Sample, augment, draw_support
from bkd_fast.errors import BKDError
from bkd_fast.model import BKD
from bkd_fast.model.bkd import Exclude, Prepared
from bkd_fast.model.calibration import learn_normal
from bkd_fast.training.checkpoint import Progress, load_checkpoint, save_checkpoint, write_log
from bkd_fast.training.feature_cache import FeatureSource
from bkd_fast.training.interruption import interruptible
from bkd_fast.training.sampler import Schedule
from bkd_fast.training.step import TrainingStep, make_optimizer, train_step
from bkd_fast.training.thresholds import measure_normals
from bkd_fast.version import __version__

log = logging.getLogger("bkd_fast")
CHECKPOINT_SECONDS = 60  # least time between two checkpoints of an undisturbed training
PLATEAU = 0.002  # a held-out loss counts as lower if it is by this share


@dataclass(frozen=True)
class Job:
    """One category to train, its images checked and divided."""

    name: str
    train: list[Sample]
    held_out: list[Sample]
    folder: Path


@dataclass(frozen=True)
class Room:
    """Where teacher features are kept: so many bytes, in memory or in a folder."""

    bytes: int
    folder: Path | None = None


class Trainer:
    """Trains one category; :meth:`run` once."""

    def __init__(
        self, fabric: Fabric, config: BKDConfig, job: Job, source: DataSource, room: Room, progress: bool | None
    ) -> None:
        self.fabric, self.config, self.job, self.source = fabric, config, job, source
        self.show = progress if fabric.is_global_zero else False
        fabric.seed_everything(config.seed, verbose=False)
        self.model = BKD(config).to(fabric.device)
        self.learned = self.model.learned_branches()
        self.optimizer: Any = make_optimizer(self.model, config) if self.learned else None
        self.features = self._source(job.train, room)
        self.held_out = self._source(job.held_out, room)
        self.count = len(self.features.dataset)  # images, or their tiles
        self.schedule = Schedule(self.count, config, rank=fabric.global_rank, world=fabric.world_size)
        self.checkpoint = job.folder / CHECKPOINT
        self.saved_at = time.monotonic()

    def _source(self, samples: list[Sample], room: Room) -> FeatureSource:
        share = len(samples) / (len(self.job.train) + len(self.job.held_out))
        return FeatureSource(
            ImageDataset(samples, self.config.image_size, self.config.tile),
            self.model.teacher,
            self.fabric.device,
            int(share * room.bytes),
            folder=room.folder,
        )

    def run(self) -> None:
        """Trains to the end, calibrates on the held-out normals and writes the category's folder."""
        state = self._begin()
        for _ in self.held_out.fill():
            pass
        if self.optimizer is None:  # calibration was all
            self._finish()
            return
        step, optimizer = self.fabric.setup(TrainingStep(self.model), self.optimizer)
        step.train()
        scaler = getattr(self.fabric.strategy.precision, "scaler", None)
        if scaler is not None and state.scaler:
            scaler.load_state_dict(state.scaler)
        total = self.config.epochs * self.schedule.steps
        bar = tqdm(
            total=total,
            initial=state.epoch * self.schedule.steps + state.step,
            desc=self.job.name,
            unit="step",
            dynamic_ncols=True,
            disable=None if self.show is None else not self.show,
        )
        with bar, interruptible() as interrupted:
            while state.epoch < self.config.epochs and not self._settled(state):
                self._epoch(step, optimizer, state, bar, interrupted)
        if state.epoch < self.config.epochs:
            self._save(state)
        self._finish()

    def _begin(self) -> Progress:
        """Statistics and memory, or the checkpoint in their place; one pass over the images, and the support pool."""
        count, levels = self.count, self.features.fill()
        state, generator = None, None
        if self.checkpoint.is_file():
            state = load_checkpoint(self.checkpoint, self.model, self.optimizer)
            if not self.config.looks_up:  # only what is kept is wanted of them
                levels = islice(levels, self.features.capacity)
        else:
            generator = torch.Generator().manual_seed(self.config.seed)
        self.pool = learn_normal(self.model, levels, count, generator)
        if self.pool:
            self.place = torch.full((count,), -1)
            self.place[self.pool] = torch.arange(len(self.pool))
            self.prepared = self.model.prepare(self._support(self.pool))
        return state or Progress()

    def _support(self, indices: Sequence[int]) -> list[Tensor]:
        """What :meth:`BKD.prepare` takes, of training images."""
        batched = [level.unsqueeze(0) for level in self.features.levels(indices)]
        return [level.half() for level in batched] if self.config.looks_up else batched

    def _epoch(self, step: nn.Module, optimizer: Any, state: Progress, bar: tqdm, interrupted: list[bool]) -> None:
        started, images = time.monotonic(), 0
        for part in self.schedule.epoch(state.epoch, state.step):
            for group in optimizer.param_groups:
                group["lr"] = group["scale"] * self.schedule.rate(state.epoch, state.step)
            query = self.features.levels(part.queries)
            support: Any = []
            if part.supports:
                support = self.model.support_levels(self._drawn(part.supports, part.seed))
            elif self.pool:
                support = self.prepared
            exclude = self._exclude(part.queries) if self.pool else None
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
        means = {
            name: value if name.startswith("max") else value / self.schedule.steps for name, value in state.sums.items()
        }
        if self.config.patience:
            means["held_out"] = self._held_out_loss()
        state.rows.append(
            {
                "epoch": state.epoch + 1,
                **means,
                "learning_rate": self.schedule.rate(state.epoch, self.schedule.steps - 1),
                "seconds": round(time.monotonic() - started, 3),
            }
        )
        state.epoch, state.step, state.sums = state.epoch + 1, 0, {}
        if time.monotonic() - self.saved_at > CHECKPOINT_SECONDS or state.epoch == self.config.epochs:
            self._save(state)

    def _exclude(self, queries: Sequence[int]) -> Exclude:
        """A training image is not its own support."""
        place = self.place[queries].to(self.fabric.device).unsqueeze(1)
        return Exclude(place == torch.arange(len(self.pool), device=self.fabric.device), None)

    def _drawn(self, supports: Sequence[Sequence[int]], seed: int) -> Tensor:
        """Augmented support images: (k, 3, H, W) shared by a step, or (N, k, 3, H, W)."""
        flat = [index for row in supports for index in row]
        generator = torch.Generator().manual_seed(seed)
        images = augment(self.features.images(flat), self.config.support_augmentation, generator)
        return images if len(supports) == 1 else images.unflatten(0, (len(supports), -1))

    @torch.no_grad()
    def _held_out_loss(self) -> float:
        """The loss of normals that are not trained on, whose support is the one that is kept."""
        model, total = self.model, 0.0
        model.eval()
        prepared: Prepared = []
        if self.pool:
            prepared = self.prepared
        elif self.config.forward_branch:
            prepared = model.prepare(self._support(self._kept_support()))
        count = len(self.held_out.dataset)
        for start in range(0, count, self.schedule.batch):
            indices = range(start, min(start + self.schedule.batch, count))
            with self.fabric.autocast():
                result = model.distill(self.held_out.levels(indices), prepared, branches=self.learned)
            total += len(indices) * float(model.losses(result)["total"])
        model.train()
        return total / count

    def _settled(self, state: Progress) -> bool:
        """Whether the held-out loss has come to rest: no epoch of the last ``patience`` was lower than those before."""
        if not self.config.patience:
            return False
        best, since = math.inf, 0
        for row in state.rows:
            if row["held_out"] < (1 - PLATEAU) * best:
                best, since = row["held_out"], 0
            else:
                since += 1
        # Every process measures the same, but one decides: rounding must not part them.
        settled = bool(self.fabric.broadcast(since >= self.config.patience))
        if settled:
            log.info("%s: the loss of held-out normals came to rest after %d epochs", self.job.name, len(state.rows))
        return settled

    def _kept_support(self) -> list[int]:
        """The training images that a run keeps as support; without forward branch, to show what normal is."""
        if self.pool:
            return self.pool
        generator = torch.Generator().manual_seed(self.config.seed)
        return draw_support(self.count, min(self.config.shots, self.count), generator)

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
            chosen = self._kept_support()
            support = self._support(chosen) if self.config.forward_branch else []
            measured = measure_normals(self.model, self.model.prepare(support), self.features, self.held_out, self.pool)
            calibration = Calibration.of(self.model, measured.scores, measured.normal_level, self.config.false_alarms)
            if measured.duplicates:
                log.info(
                    "%s: %d training images are near duplicates of others; none was compared with its own",
                    self.job.name,
                    measured.duplicates,
                )
            log.info("%s: %s", self.job.name, calibration.sentence())
            images = [self.features.dataset.array(index) for index in chosen]
            save_trained(self.job.folder, self.model, calibration, self.source, images, support, __version__)
            self.checkpoint.unlink(missing_ok=True)
        self.features.close()
        self.held_out.close()
        self.fabric.barrier()
