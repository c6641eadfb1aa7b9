"""The training of one category: epochs, checkpoints, early stopping, and what is kept of it."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from bkd_fast.artifact import CHECKPOINT, LOG, Calibration, DataSource, Manifest, save_trained
from bkd_fast.config import BKDConfig, SampledSupport
from bkd_fast.data import ImageDataset, Sample, draw_support, shrink_roi
from bkd_fast.data.augment import augment
from bkd_fast.data.progress import counted, is_watched, progress_bar
from bkd_fast.errors import BKDError
from bkd_fast.model import BKD
from bkd_fast.model.calibration import learn_normal
from bkd_fast.model.support import Exclude, Support
from bkd_fast.normals.features import FeatureSource
from bkd_fast.normals.thresholds import measure_categories, measure_normals
from bkd_fast.training.checkpoint import Progress, load_checkpoint, save_checkpoint, write_log
from bkd_fast.training.interruption import interruptible
from bkd_fast.training.loggers import peak_memory
from bkd_fast.training.sampler import Schedule, Step
from bkd_fast.training.step import TrainingStep, make_optimizer, train_step
from bkd_fast.training.weights import load_weights
from bkd_fast.version import __version__

log = logging.getLogger("bkd_fast")
CHECKPOINT_SECONDS = 60  # min time between two checkpoints
SHOWN = 16  # images kept of a run without supports, to show what normal is
PLATEAU = 0.002  # the share by which a validation loss must fall to count as lower


@dataclass(frozen=True)
class Job:
    """One category to train, its images checked and divided; ``done`` if its run is there already.

    ``roi``: (H, W) bool, what is looked at; None: everything.
    """

    name: str
    train: list[Sample]
    validation: list[Sample]
    folder: Path
    source: DataSource
    done: bool = False
    roi: np.ndarray | None = None
    categories: tuple[str, ...] = ()  # of a model of several; names of images then begin with their category

    def labels(self, samples: Sequence[Sample]) -> list[int]:
        """Return the category of each image."""
        return [self.categories.index(sample.name.partition("/")[0]) for sample in samples]


class Trainer:
    """Trains one category; :meth:`run` once.

    Args:
        cache_bytes: size of the teacher-feature cache.
        cache_dir: its folder; None: in memory.
        prefix: of the names of metrics that fabric's loggers get.
    """

    def __init__(
        self,
        fabric: Fabric,
        config: BKDConfig,
        job: Job,
        cache_bytes: int,
        cache_dir: Path | None,
        progress: bool | None,
        prefix: str = "",
    ) -> None:
        self.fabric, self.config, self.job = fabric, config, job
        self.prefix, self.steps = prefix, 0  # of the names of metrics; done so far
        self.show = progress if fabric.is_global_zero else False
        fabric.seed_everything(config.training.seed, verbose=False)
        self.model = BKD(config, weights=load_weights(config.teacher)).to(fabric.device)
        if job.roi is not None and not config.teacher.tile:
            self.model.set_roi(shrink_roi(job.roi, config.teacher.size))
        self.learned = self.model.learned_branches()
        self.optimizer: Any = make_optimizer(self.model, config) if self.learned else None
        self.features, self.validation = (
            FeatureSource(
                ImageDataset(samples, config.teacher.size, config.teacher.tile or 0, config.data, job.roi),
                self.model.teacher,
                fabric.device,
                int(len(samples) / (len(job.train) + len(job.validation)) * cache_bytes),
                folder=cache_dir,
            )
            for samples in (job.train, job.validation)
        )
        self.count = len(self.features.dataset)  # images, or their tiles
        self.schedule = Schedule(self.count, config, rank=fabric.global_rank, world=fabric.world_size)
        self.checkpoint = job.folder / CHECKPOINT
        self.saved_at = time.monotonic()

    def run(self) -> None:
        """Train to the end, calibrate on the validation normals and write the category's folder."""
        with self._part("features"):
            state = self._begin()
            for _ in self.validation.fill():
                pass
        if self.optimizer is not None:
            with self._part("training"):
                self._train(state)
        with self._part("thresholds"):
            self._finish()

    def _train(self, state: Progress) -> None:
        """Train by gradients, from where ``state`` is to the last epoch."""
        step, optimizer = self.fabric.setup(TrainingStep(self.model), self.optimizer)
        step.train()
        scaler = getattr(self.fabric.strategy.precision, "scaler", None)
        if scaler is not None and state.scaler:
            scaler.load_state_dict(state.scaler)
        total = self.config.training.epochs * self.schedule.steps
        # Where nobody watches, there is a line for each epoch.
        show = is_watched() if self.show is None else self.show
        self.steps = state.epoch * self.schedule.steps + state.step
        bar = progress_bar(total, self.job.name, "step", show, initial=self.steps)
        with bar, interruptible() as interrupted:
            while state.epoch < self.config.training.epochs and not self._settled(state):
                self._epoch(step, optimizer, state, bar, interrupted)
        if state.epoch < self.config.training.epochs:
            self._save(state)

    @contextmanager
    def _part(self, name: str) -> Iterator[None]:
        """Log how long a part of the training takes, and its peak memory."""
        started = time.monotonic()
        if self.fabric.loggers and self.fabric.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.fabric.device)
        yield
        memory = {f"{kind}/{name}": value for kind, value in peak_memory(self.fabric.device).items()}
        self._log({f"seconds/{name}": time.monotonic() - started, **memory})

    def _log(self, metrics: Mapping[str, float]) -> None:
        """Log metrics of the step that the training has reached."""
        self.fabric.log_dict({f"{self.prefix}{name}": value for name, value in metrics.items()}, self.steps)

    def _begin(self) -> Progress:
        """Compute statistics, memory and support bank in one pass over the images, or resume from the checkpoint."""
        bar = progress_bar(self.count, f"{self.job.name}, features", "image", self.show)
        count, levels = self.count, counted(self.features.fill(), bar)
        state, generator = None, None
        if self.checkpoint.is_file():
            state = load_checkpoint(self.checkpoint, self.model, self.optimizer)
            if not self.config.retrieves:  # only fill the cache
                levels = islice(levels, self.features.capacity)
        else:
            generator = torch.Generator().manual_seed(self.config.training.seed)
        groups = self.job.labels(self.job.train) if self.job.categories else None
        self.bank = learn_normal(self.model, levels, count, generator, self.features.regions, groups)
        if self.bank:
            self.index_in_bank = torch.full((count,), -1)
            self.index_in_bank[self.bank] = torch.arange(len(self.bank))
            self.support = self.model.make_support(self._levels(self.bank))
        return state or Progress()

    def _levels(self, indices: Sequence[int]) -> list[Tensor]:
        """Return the levels of training images as :meth:`BKD.make_support` takes them."""
        batched = [level.unsqueeze(0) for level in self.features.levels(indices)]
        return [level.half() for level in batched] if self.config.retrieves else batched

    def _epoch(self, step: nn.Module, optimizer: Any, state: Progress, bar: Any, interrupted: list[bool]) -> None:
        started, images = time.monotonic(), 0
        for part in self.schedule.epoch(state.epoch, state.step):
            rate = self.schedule.rate(state.epoch, state.step)
            for group in optimizer.param_groups:
                group["lr"] = group["scale"] * rate
            query = self.features.levels(part.queries)
            support = self._step_support(part)
            exclude = self._exclude(part.queries) if self.bank else None
            clip_norm = self.config.training.clip_norm
            region = self.features.regions(part.queries)
            values, offsets = train_step(self.fabric, step, optimizer, query, support, exclude, clip_norm, region)
            largest = [float(offset[0]) for offset in offsets]
            if not math.isfinite(values["total"]):
                raise self._not_finite(state, values, largest)
            state.step, self.steps = state.step + 1, self.steps + 1
            self._log({**{f"loss/{name}": value for name, value in values.items()}, "learning_rate": rate})
            images += len(part.queries) * self.fabric.world_size
            for name, value in values.items():
                state.sums[name] = state.sums.get(name, 0.0) + value
            for level, offset in enumerate(offsets, start=1):
                state.sums[f"offset_{level}"] = state.sums.get(f"offset_{level}", 0.0) + float(offset[1])
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
        if self.config.training.patience is not None:
            means["validation_loss"] = self._validation_loss()
            self._log({"loss/validation": means["validation_loss"]})
        state.rows.append(
            {
                "epoch": state.epoch + 1,
                **means,
                "learning_rate": self.schedule.rate(state.epoch, self.schedule.steps - 1),
                "seconds": round(time.monotonic() - started, 3),
            }
        )
        state.epoch, state.step, state.sums = state.epoch + 1, 0, {}
        if self.show is None and not is_watched():
            self._log_epoch(state.rows)
        if time.monotonic() - self.saved_at > CHECKPOINT_SECONDS or state.epoch == self.config.training.epochs:
            self._save(state)

    def _log_epoch(self, rows: Sequence[dict[str, float]]) -> None:
        row, epochs = rows[-1], self.config.training.epochs
        losses = ", ".join(
            f"{text} {row[name]:.4g}"
            for name, text in (("total", "loss"), ("validation_loss", "validation loss"))
            if name in row
        )
        left = row["seconds"] * (epochs - len(rows))
        log.info(
            "%s: epoch %d of %d, %s, %.1f s, at most %.0f s left",
            self.job.name, len(rows), epochs, losses, row["seconds"], left,
        )  # fmt: skip

    def _exclude(self, queries: Sequence[int]) -> Exclude:
        """A training image is not its own support."""
        own = self.index_in_bank[queries].to(self.fabric.device).unsqueeze(1)
        return Exclude(own == torch.arange(len(self.bank), device=self.fabric.device), None)

    def _step_support(self, part: Step) -> Support:
        """Return the support of a step: the bank, or sampled and augmented images."""
        if self.bank:
            return self.support
        levels = self.model.support_levels(self._sampled(part.supports, part.seed)) if part.supports else []
        return self.model.make_support(levels, frozen=False)

    def _sampled(self, supports: Sequence[Sequence[int]], seed: int) -> Tensor:
        """Return augmented support images: (k, 3, H, W) shared by a step, or (N, k, 3, H, W)."""
        assert isinstance(self.config.support, SampledSupport)
        flat = [index for row in supports for index in row]
        generator = torch.Generator().manual_seed(seed)
        images = augment(self.features.images(flat), self.config.support.augmentation, generator)
        return images if len(supports) == 1 else images.unflatten(0, (len(supports), -1))

    @torch.no_grad()
    def _validation_loss(self) -> float:
        """Return the loss of the validation normals with the support that the run keeps."""
        model, total = self.model, 0.0
        model.eval()
        support = self.support if self.bank else self._final_support()
        count = len(self.validation.dataset)
        for start in range(0, count, self.schedule.batch):
            indices = range(start, min(start + self.schedule.batch, count))
            with self.fabric.autocast():
                levels, region = self.validation.levels(indices), self.validation.regions(indices)
                result = model.distill(levels, support, branches=self.learned, region=region)
            total += len(indices) * float(model.losses(result)["total"])
        model.train()
        return total / count

    def _settled(self, state: Progress) -> bool:
        """Return whether no epoch of the last ``patience`` had a lower validation loss than those before."""
        if self.config.training.patience is None:
            return False
        best, since = math.inf, 0
        for row in state.rows:
            if row["validation_loss"] < (1 - PLATEAU) * best:
                best, since = row["validation_loss"], 0
            else:
                since += 1
        # Every process measures the same, but one decides: rounding must not part them.
        settled = bool(self.fabric.broadcast(since >= self.config.training.patience))
        if settled:
            log.info("%s: the validation loss stopped falling after %d epochs", self.job.name, len(state.rows))
        return settled

    def _kept_support(self) -> list[int]:
        """Return the training images that a run keeps as support; without forward branch, to show what normal is."""
        if self.bank:
            return self.bank
        shots = SHOWN if self.config.support is None else self.config.support.shots
        generator = torch.Generator().manual_seed(self.config.training.seed)
        return draw_support(self.count, min(shots, self.count), generator)

    def _final_support(self) -> Support:
        """Return the support that the run keeps, with the weights of now."""
        return self.model.make_support(self._levels(self._kept_support()) if self.config.forward_branch else [])

    def _save(self, state: Progress) -> None:
        scaler = getattr(self.fabric.strategy.precision, "scaler", None)
        state.scaler = scaler.state_dict() if scaler is not None else {}
        if self.fabric.is_global_zero and all(torch.isfinite(p).all() for p in self.model.parameters()):
            save_checkpoint(self.checkpoint, self.model, self.optimizer, state, self.job.source)
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
            f"{offsets}; {kept}. Lower training.learning_rate or training.offset_lr_scale, bound the offsets "
            "(alignment.activation='tanh'), or set training.clip_norm."
        )

    def _finish(self) -> None:
        """Support, thresholds and scales, then the folder; only then is the checkpoint dropped."""
        if self.fabric.is_global_zero:
            self.model.eval()
            chosen = self._kept_support()
            levels = self._levels(chosen) if self.config.forward_branch else []
            support = self.model.make_support(levels)
            measured = measure_normals(self.model, support, self.features, self.validation, self.bank)
            false_alarms = self.config.training.false_alarms
            calibration = Calibration.of(measured.scores, measured.normal_level, false_alarms, measured.teacher)
            unified = None
            if self.job.categories:
                train = self.job.labels(self.job.train)
                labels, bank = [*self.job.labels(self.job.validation), *train], [train[index] for index in self.bank]
                calibration, unified = measure_categories(
                    self.model, measured, labels, self.job.categories, bank, false_alarms
                )
            if measured.duplicates:
                log.info("%s: %d training images are near duplicates of others", self.job.name, measured.duplicates)
            of_each = {"": calibration}
            if unified is not None:
                of_each = {f"{name}/": own for name, own in zip(unified.names, unified.calibrations, strict=True)}
            for name, own in of_each.items():
                log.info("%s: %s", f"{self.job.name}/{name}".rstrip("/"), own.sentence())
            self._log(
                {
                    **{
                        f"{name}{value}": getattr(own, value)
                        for name, own in of_each.items()
                        for value in ("threshold", "pixel_threshold", "normal_level")
                    },
                    "images/train": len(self.job.train),
                    "images/validation": len(self.job.validation),
                }
            )
            images = [self.features.dataset.array(index) for index in chosen]
            tiles = self.features.dataset.tiles if self.config.teacher.tile else []
            manifest = Manifest(__version__, calibration, self.job.source, {}, chosen, tiles, unified)
            save_trained(self.job.folder, self.model, manifest, images, levels, self.job.roi)
            self.checkpoint.unlink(missing_ok=True)
        self.features.close()
        self.validation.close()
        self.fabric.barrier()
